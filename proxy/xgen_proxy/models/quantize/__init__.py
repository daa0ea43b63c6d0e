"""Converts and quantises models, in processes of their own."""
