"""Votes over groups of equal answers: files of samples, curves over k, results, reports."""
