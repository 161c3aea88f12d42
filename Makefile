# Any Python from 3.11 on. A Detectron2 that it can import already is used as it is.
PYTHON ?= $(shell python3.11 -V >/dev/null 2>&1 && echo python3.11 || echo python3)

.PHONY: setup demo test clean

setup: .venv/.ready

demo: .venv/.ready
	.venv/bin/python tools/demo.py

# Idle OpenMP threads that spin would slow down tests that train in several processes.
test: export OMP_WAIT_POLICY := PASSIVE
# Tiny models gain nothing from a second thread.
test: export OMP_NUM_THREADS := 1
test: .venv/.ready
	.venv/bin/python -m pytest tests

# `*.*` leaves out __pycache__, which an installation touches.
.venv/.ready: requirements.txt setup.py packaging/setup_env.py $(wildcard packaging/detectron2/*.*)
	$(PYTHON) packaging/setup_env.py
	@touch $@

clean:
	rm -rf .venv .pytest_cache build projects/SharedKD/*.egg-info
	find packaging projects tests tools -name __pycache__ -prune -exec rm -rf {} +
