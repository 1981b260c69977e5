"""The leak audit: does anything a model says about a token depend on what comes after it?

`run.audit(model, vocab_size)` is the way in; docs/audit.md says what each check sees and what it cannot see.
"""
