"""System calls that programs in the sandbox may make; every other one fails with EPERM.

Not among them, so that nothing has to be trusted to be harmless: processes (fork, vfork, execve), sockets, signals to
others, ptrace, namespaces, mounts, io_uring, bpf, keys, memfd, shared memory, and what Landlock does not cover (chmod,
chown, utime, xattr, truncate by path, readlink, inotify). Numbers: asm/unistd_64.h and asm-generic/unistd.h of Linux.
"""

from __future__ import annotations

CONDITIONAL = (
    *("clone", "clone3", "kill", "tgkill", "prlimit64", "fcntl", "ioctl", "socketpair", "sendto", "mmap", "mprotect"),
)
"""Allowed with some arguments only (seccomp.py says which), but for clone3: it is said not to exist, because its
arguments stand where a filter cannot read them; C libraries then use clone."""

# fmt: off
NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "read": 0, "write": 1, "readv": 19, "writev": 20, "pread64": 17, "pwrite64": 18, "preadv": 295,
        "pwritev": 296, "preadv2": 327, "pwritev2": 328, "open": 2, "openat": 257, "creat": 85, "close": 3,
        "close_range": 436, "stat": 4, "fstat": 5, "lstat": 6, "newfstatat": 262, "statx": 332, "statfs": 137,
        "fstatfs": 138, "poll": 7, "ppoll": 271, "select": 23, "pselect6": 270, "lseek": 8, "brk": 12, "munmap": 11,
        "mremap": 25, "madvise": 28, "mincore": 27, "msync": 26, "rt_sigaction": 13, "rt_sigprocmask": 14,
        "rt_sigreturn": 15, "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131,
        "access": 21, "faccessat": 269, "faccessat2": 439, "pipe": 22, "pipe2": 293, "sched_yield": 24,
        "sched_getaffinity": 204, "dup": 32, "dup2": 33, "dup3": 292, "pause": 34, "nanosleep": 35,
        "clock_nanosleep": 230, "clock_gettime": 228, "clock_getres": 229, "gettimeofday": 96, "time": 201,
        "times": 100, "getitimer": 36, "setitimer": 38, "alarm": 37, "getpid": 39, "gettid": 186, "getppid": 110,
        "getuid": 102, "geteuid": 107, "getgid": 104, "getegid": 108, "getpgrp": 111, "getpgid": 121, "getsid": 124,
        "getgroups": 115, "getresuid": 118, "getresgid": 120, "uname": 63, "sysinfo": 99, "getrusage": 98,
        "getrlimit": 97, "getpriority": 140, "getcpu": 309, "membarrier": 324, "flock": 73, "fsync": 74,
        "fdatasync": 75, "ftruncate": 77, "fallocate": 285, "getdents": 78, "getdents64": 217, "getcwd": 79,
        "chdir": 80, "fchdir": 81, "rename": 82, "renameat": 264, "renameat2": 316, "mkdir": 83, "mkdirat": 258,
        "rmdir": 84, "unlink": 87, "unlinkat": 263, "symlink": 88, "symlinkat": 266, "umask": 95, "sendfile": 40,
        "copy_file_range": 326, "fadvise64": 221, "futex": 202, "set_robust_list": 273, "set_tid_address": 218,
        "rseq": 334, "exit": 60, "exit_group": 231, "restart_syscall": 219, "getrandom": 318, "epoll_create": 213,
        "epoll_create1": 291, "epoll_ctl": 233, "epoll_wait": 232, "epoll_pwait": 281, "epoll_pwait2": 441,
        "eventfd": 284, "eventfd2": 290, "timerfd_create": 283, "timerfd_settime": 286, "timerfd_gettime": 287,
        "recvfrom": 45, "shutdown": 48, "getsockname": 51, "getpeername": 52, "getsockopt": 55, "clone": 56,
        "clone3": 435, "kill": 62, "tgkill": 234, "prlimit64": 302, "fcntl": 72, "ioctl": 16, "socketpair": 53,
        "sendto": 44, "mmap": 9, "mprotect": 10,
    },
    "aarch64": {
        "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "preadv": 69,
        "pwritev": 70, "preadv2": 286, "pwritev2": 287, "openat": 56, "close": 57, "close_range": 436, "fstat": 80,
        "newfstatat": 79, "statx": 291, "statfs": 43, "fstatfs": 44, "ppoll": 73, "pselect6": 72, "lseek": 62,
        "brk": 214, "munmap": 215, "mremap": 216, "madvise": 233, "mincore": 232, "msync": 227, "rt_sigaction": 134,
        "rt_sigprocmask": 135, "rt_sigreturn": 139, "rt_sigpending": 136, "rt_sigtimedwait": 137,
        "rt_sigsuspend": 133, "sigaltstack": 132, "faccessat": 48, "faccessat2": 439, "pipe2": 59, "sched_yield": 124,
        "sched_getaffinity": 123, "dup": 23, "dup3": 24, "nanosleep": 101, "clock_nanosleep": 115,
        "clock_gettime": 113, "clock_getres": 114, "gettimeofday": 169, "times": 153, "getitimer": 102,
        "setitimer": 103, "getpid": 172, "gettid": 178, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
        "getegid": 177, "getpgid": 155, "getsid": 156, "getgroups": 158, "getresuid": 148, "getresgid": 150,
        "uname": 160, "sysinfo": 179, "getrusage": 165, "getrlimit": 163, "getpriority": 141, "getcpu": 168,
        "membarrier": 283, "flock": 32, "fsync": 82, "fdatasync": 83, "ftruncate": 46, "fallocate": 47,
        "getdents64": 61, "getcwd": 17, "chdir": 49, "fchdir": 50, "renameat": 38, "renameat2": 276, "mkdirat": 34,
        "unlinkat": 35, "symlinkat": 36, "umask": 166, "sendfile": 71, "copy_file_range": 285, "fadvise64": 223,
        "futex": 98, "set_robust_list": 99, "set_tid_address": 96, "rseq": 293, "exit": 93, "exit_group": 94,
        "restart_syscall": 128, "getrandom": 278, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22,
        "epoll_pwait2": 441, "eventfd2": 19, "timerfd_create": 85, "timerfd_settime": 86, "timerfd_gettime": 87,
        "recvfrom": 207, "shutdown": 210, "getsockname": 204, "getpeername": 205, "getsockopt": 209, "clone": 220,
        "clone3": 435, "kill": 129, "tgkill": 131, "prlimit64": 261, "fcntl": 25, "ioctl": 29, "socketpair": 199,
        "sendto": 206, "mmap": 222, "mprotect": 226,
    },
}
# fmt: on
"""Number by name, by machine. The newer architectures have no call for what another one does (open, for example)."""
