"""Final answers of rationales, and which of them are equal."""
