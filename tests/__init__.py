"""The tests. A package, so that its helpers win over a stray ``tests`` that other distributions install."""
