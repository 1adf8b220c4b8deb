"""Commands that look at a config, a model, a data set or a log. Each module has ``main``; ``tools/`` calls it."""
