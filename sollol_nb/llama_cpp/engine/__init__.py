"""The llama.cpp programs: find them on this machine, or build them.

* `find.py`: find a pair of programs, or have it built
* `check.py`: check that a pair runs on this machine and works together
* `build.py`: fetch llama.cpp at one pinned commit, build it, install it in the cache folder
* `steps.py`: run the programs of a build, with a log, progress and a time limit
* `build_guard.py`: end the programs of a build whose kernel was killed
* `archives.py`: the worker program, and the source that builds it, packed for other machines
* `tools.py`: CMake, compilers and GPU toolkits of this machine
"""
