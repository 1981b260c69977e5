.PHONY: help
help:
	@echo nano_think
