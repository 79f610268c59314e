"""What a user wants to know about a run: its speed, its plan, its curves, its views, and the state of the machine."""
