"""The llama.cpp programs: find them on this machine, or build them.

* `find.py`: find a pair of programs and check that they work together
* `build.py`: fetch llama.cpp at one pinned commit, build it, install it in the cache folder
* `steps.py`: run the programs of a build, with a log, progress and a time limit
* `tools.py`: CMake, compilers and GPU toolkits of this machine
"""
