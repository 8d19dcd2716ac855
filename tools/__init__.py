"""Tools for people who change calm_fast; not installed."""
