"""The embedded demo task: acceptability of sentences from a lexicon and a grammar."""
