"""How good a distilled set is: students trained on it and, by the same rules, on what it must be better than."""
