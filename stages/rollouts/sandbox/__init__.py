"""A sandbox for Python programs that nobody has read: they run confined, and only data comes back.

Layers: a process of its own with no_new_privs, no capabilities, an empty environment and bounds on processor time,
memory, files and output; Landlock (files, TCP, signals); a seccomp filter that allows what a calculation needs; where
the kernel lets this user have them, namespaces. Not promised: that no kernel has a hole, that a program cannot learn of
a file outside that it exists and how large it is, side channels. Standard library only, because the confined processes
load it without the packages of the machine.
"""
