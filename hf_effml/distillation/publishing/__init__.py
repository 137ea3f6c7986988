"""Distilled sets as files that anybody can use: tables, their description, pictures."""
