"""Attacks on files: each tries to read, change or name something outside the program's folder.

`w` names what there is outside: `secret` (a file that anybody may read, in `folder`, which anybody may write), `victim`
(a file that anybody may write), `shared` (in /dev/shm).
"""

# ruff: noqa: SIM115

import contextlib
import ctypes
import os
import shutil
import tempfile

libc = ctypes.CDLL(None, use_errno=True)


def write_outside(w):
    open(f"{w['folder']}/written", "w").write("x")


def write_by_relative_path(w):
    open("../" * 20 + w["folder"].lstrip("/") + "/written", "w").write("x")


def write_through_a_symbolic_link(w):
    os.symlink(w["folder"], "inside")
    open("inside/written", "w").write("x")


def write_over_a_symbolic_link_to_a_file(w):
    os.symlink(w["victim"], "inside")
    open("inside", "w").write("x")


def write_through_the_working_directory_of_a_process(w):
    open(f"/proc/self/cwd/{'../' * 20}{w['folder']}/written", "w").write("x")


def append_to_a_file(w):
    open(w["victim"], "a").write("x")


def open_and_truncate(w):
    os.open(w["victim"], os.O_RDWR | os.O_TRUNC)


def truncate_by_path(w):
    os.truncate(w["victim"], 0)


def remove_a_file(w):
    os.unlink(w["victim"])


def rename_a_file(w):
    os.rename(w["victim"], w["victim"] + ".moved")


def move_a_file_inside(w):
    os.rename(w["victim"], "mine")


def move_own_file_outside(w):
    open("mine", "w").write("x")
    shutil.move("mine", f"{w['folder']}/written")


def replace_a_file(w):
    open("mine", "w").write("x")
    os.replace("mine", w["victim"])


def make_a_folder(w):
    os.mkdir(f"{w['folder']}/made")


def make_a_link_outside(w):
    os.symlink("/", f"{w['folder']}/link")


def make_a_pipe_outside(w):
    os.mkfifo(f"{w['folder']}/pipe")


def hard_link_outside(w):
    open("mine", "w").write("x")
    os.link("mine", f"{w['folder']}/written")


def hard_link_the_secret_inside(w):
    os.link(w["secret"], "mine")
    return open("mine").read()


def change_mode(w):
    os.chmod(w["victim"], 0o777)


def change_mode_of_an_open_file(w):
    os.fchmod(os.open(os.__file__, os.O_RDONLY), 0o777)


def change_owner(w):
    os.chown(w["victim"], 1, 1)


def change_times(w):
    os.utime(w["victim"], (1, 1))


def set_an_extended_attribute(w):
    os.setxattr(w["victim"], "user.mark", b"x")


def remove_everything(w):
    shutil.rmtree(w["folder"])


def remove_its_own_folder(w):
    """The server would find none, and the next program have none."""
    here = os.getcwd()
    for attempt in (lambda: os.rmdir(here), lambda: os.rename(here, f"{here}.moved"), lambda: os.rmdir("../program")):
        with contextlib.suppress(OSError):
            attempt()
            return "ESCAPED"


def write_beside_its_folder(w):
    open("../beside", "w").write("x")
    return "ESCAPED"


def temporary_file_elsewhere(w):
    tempfile.NamedTemporaryFile(dir=w["folder"], delete=False).write(b"x")


def unnamed_file_linked_outside(w):
    opened = os.open(".", os.O_TMPFILE | os.O_RDWR)
    os.link(f"/proc/self/fd/{opened}", f"{w['folder']}/written", follow_symlinks=True)


def read_the_secret(w):
    return open(w["secret"]).read()


def read_by_symbolic_link(w):
    os.symlink(w["secret"], "inside")
    return open("inside").read()


def read_by_the_root_of_a_process(w):
    return open(f"/proc/self/root{w['secret']}").read()


def read_in_an_opened_folder(w):
    folder = os.open(w["folder"], os.O_PATH)
    return open(os.open(os.path.basename(w["secret"]), os.O_RDONLY, dir_fd=folder)).read()


def read_after_changing_directory(w):
    os.chdir(w["folder"])
    return open(os.path.basename(w["secret"])).read()


def read_by_mapping(w):
    import mmap

    return mmap.mmap(os.open(w["secret"], os.O_RDONLY), 0, prot=mmap.PROT_READ)[:]


def read_by_copying(w):
    mine = os.open("mine", os.O_RDWR | os.O_CREAT)
    os.sendfile(mine, os.open(w["secret"], os.O_RDONLY), 0, 100)
    return open("mine").read()


def read_by_handle(w):
    handle = ctypes.create_string_buffer(b"\x80\0\0\0" + bytes(140))
    mount = ctypes.c_int()
    if libc.name_to_handle_at(-100, w["secret"].encode(), handle, ctypes.byref(mount), 0x400) == 0:
        return os.read(libc.open_by_handle_at(os.open(".", os.O_RDONLY), handle, 0), 100)


def list_a_folder(w):
    return os.listdir(w["folder"])


def list_by_walking(w):
    return [name for _, folders, names in os.walk(w["folder"]) for name in [*folders, *names]]


def read_a_link(w):
    return os.readlink(w["link"])


def read_password_hashes(w):
    with contextlib.suppress(OSError):
        return "ESCAPED " + open("/etc/shadow").read()
    return "ESCAPED " + open("/etc/passwd").read()


def read_shared_memory(w):
    return open(w["shared"]).read()


def write_shared_memory(w):
    open(w["shared"], "w").write("x")


def watch_a_folder(w):
    watching = libc.inotify_init()
    if watching >= 0 and libc.inotify_add_watch(watching, w["folder"].encode(), 0xFFF) >= 0:
        return "ESCAPED"


def device_nodes(w):
    """A disk, the kernel's memory and its log, by their names and by nodes of its own."""
    opened = []
    os_nodes = {"/dev/vda": (0o060000, 254, 0), "/dev/sda": (0o060000, 8, 0), "/dev/mem": (0o020000, 1, 1)}
    for path, (kind, major, minor) in os_nodes.items():
        for attempt in (lambda path=path: path, lambda k=kind, m=major, n=minor: made_node(k, m, n)):
            with contextlib.suppress(OSError):
                os.open(attempt(), os.O_RDONLY)
                opened.append(path)
    for path in ("/dev/kmsg", "/dev/console", "/dev/tty", "/dev/fuse", "/dev/net/tun", "/dev/kvm", "/dev/ptmx"):
        with contextlib.suppress(OSError):
            os.open(path, os.O_RDWR)
            opened.append(path)
    return "ESCAPED" if opened else None


def made_node(kind, major, minor):
    os.mknod("node", kind | 0o666, os.makedev(major, minor))
    return "node"


def kernel_settings(w):
    open("/proc/sys/kernel/core_pattern", "w").write("|/bin/false")


def control_groups(w):
    os.mkdir("/sys/fs/cgroup/memory/mine")
    return "ESCAPED"


def python_library(w):
    """What the next program imports."""
    open(os.path.join(os.path.dirname(os.__file__), "written_by_an_attack.py"), "w").write("x")
    return "ESCAPED"
