"""What outlives a process, counted: `python -m tests.lasting NAME --n N`, or `make lasting` for all.

- `__main__.py`: the command; without a NAME it prints all names.
- `goals.py`: what was counted, and what it must be.
- each other module has the trials of one NAME.

Such a module has a docstring whose first line says what it shows, a number `N` of trials that the command runs by
default, and a function `run(n, seed, show)` that returns its goals and shows a line for each trial. The command
sets a state folder and a cache folder of their own before it calls it; the engine and the real models are those of
the user's cache folder. A small number of trials of each runs as a test.
"""
