"""The page of app.py: what a visitor chooses, what is drawn of it, and how it looks."""
