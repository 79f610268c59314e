"""Tools for understanding a run: speed, plan, curves, views, and checks of the machine."""
