"""What an encoder is worth after pre-training: scores, detection, embeddings, exports."""
