"""Tools around a run: its speed, plan, curves and views, and the state of the machine."""
