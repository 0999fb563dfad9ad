"""Texts with labels in files of a user's: reading, columns, kinds of labels, splits, findings, the task `files`."""
