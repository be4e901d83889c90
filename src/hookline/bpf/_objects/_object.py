"""Object files: open, configure, load."""

from __future__ import annotations

import ctypes
import errno as errnos
import mmap
import os
import stat
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from hookline.bpf import _syscall
from hookline.bpf._errors import BpfError, ObjectError
from hookline.bpf._maps._map import Map, MapDefinition
from hookline.bpf._objects import _libbpf, _sections
from hookline.bpf._owner import Owner
from hookline.bpf._programs._program import Program
from hookline.bpf._types._btf import Btf, Kind
from hookline.bpf._types._codec import fill, unknown_name

if TYPE_CHECKING:
    from hookline.bpf._maps._ring import Ring

__all__ = ["Constants", "Object"]

_Item = TypeVar("_Item")

# The verifier's log; its pages take memory only once they are written.
_LOG_BYTES = 64 << 20
_LOG_LEVELS = 7
# Far more than any object has.
_LARGEST = 256 << 20


class Constants(MutableMapping[str, Any]):
    """The ``const volatile`` variables of an object, by name.

    Before the load they can be set; the verifier then takes them for constants and drops the code that they
    rule out. Values are numbers, dicts or tuples for structs, sequences or bytes for arrays. What is read is
    a NumPy scalar or a read-only array.
    """

    def __init__(self, owner: str, lock: threading.RLock) -> None:
        self._owner = owner
        # The object's: libbpf's memory may go only when nobody is at it.
        self._lock = lock
        self._places: dict[str, npt.NDArray[Any]] = {}
        self._sealed = ""

    def _add(self, memory: npt.NDArray[np.uint8], dtype: np.dtype[Any]) -> None:
        section = memory.view(dtype).reshape(())
        for name in dtype.names or ():
            self._places[name] = section[name]

    def _seal(self, why: str) -> None:
        """Keep the values when libbpf's memory goes, and let nothing change them."""
        self._sealed = why
        self._places = {name: np.array(place) for name, place in self._places.items()}

    def __getitem__(self, name: str) -> Any:
        with self._lock:
            found = self._place(name).copy()
        if found.ndim == 0:
            return found[()]
        found.flags.writeable = False
        return found

    def __setitem__(self, name: str, value: object) -> None:
        with self._lock:
            place = self._place(name)
            if self._sealed:
                raise BpfError(
                    f"constant {name!r} cannot be set any more",
                    why=self._sealed,
                    remedy="set it before load()",
                )
            fresh = np.zeros_like(place)
            fill(fresh, value, f"constant {name!r}")
            place[...] = fresh

    def __delitem__(self, name: str) -> None:
        raise BpfError(
            f"constant {name!r} cannot be removed",
            why="it is part of the object",
            remedy="set it to 0 or to an empty value",
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __repr__(self) -> str:
        return f"<Constants of {self._owner}: {', '.join(self)}>"

    def _place(self, name: str) -> npt.NDArray[Any]:
        if name not in self._places:
            raise unknown_name("constant", name, list(self._places), self._owner)
        return self._places[name]


class Object(Owner):
    """An eBPF object file: its programs, maps and constants, and after `load` what the kernel made of them.

    The programs and maps belong to the object and are closed with it. What must outlive it is pinned, attached by
    a link, or taken along by ``duplicate()``.

    Attributes:
        name: The file's name without its ending.
        constants: The ``const volatile`` variables.
        programs: Every program by its C function's name.
        maps: Every map by its name; those of global variables as ``.rodata``, ``.data``, ``.bss``.
        log: What the verifier wrote at the load, where it was asked to (`open`'s `log_level`).
    """

    def __init__(self, data: bytes, name: str, *, log_level: int = 0) -> None:
        from hookline.bpf._objects._elf import validate

        validate(data, name)
        self.name = name
        # libbpf's object is nobody's but the thread's that uses it.
        self._lock = threading.RLock()
        self.constants = Constants(name, self._lock)
        self._library = _libbpf.library()
        self._data = data
        self._log = _new_log()
        self._logs: dict[str, mmap.mmap] = {}
        self.log = ""
        self._log_level = log_level
        self._loaded = False
        self._handle: int | None = self._open(name)
        try:
            self.btf = self._read_btf()
            self._program_handles: dict[str, int] = {}
            self._map_handles: dict[str, int] = {}
            self.programs: Mapping[str, Program] = _Named("program", name, self._list_programs())
            self.maps: Mapping[str, Map] = _Named("map", name, self._list_maps())
        except BaseException:
            self._release()
            raise

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        name: str = "",
        log_level: int = 0,
    ) -> Self:
        """Open an object file, or the bytes of one. Nothing reaches the kernel yet.

        Args:
            source: A path, or the file's bytes.
            name: What to call it in messages; the file's name where it is left out.
            log_level: What the verifier writes to `log` when it accepts: 4 its statistics, 2 every step too. (When it
                refuses, `VerifierError.log` has its steps whatever is asked for here.)

        Raises:
            ObjectError: It is not an eBPF object for this machine, is damaged, has no BTF, or defines its
                maps in the old style.
            BpfError: libbpf is missing, or there is no such log level.
        """
        if not 0 <= log_level <= _LOG_LEVELS:
            raise BpfError(f"there is no log level {log_level}", why="it is 0, or a sum of 1, 2 and 4")
        if isinstance(source, bytes | bytearray | memoryview):
            return cls(bytes(source), name or "object", log_level=log_level)
        path = Path(source)
        name = name or path.name.removesuffix(".o").removesuffix(".bpf")
        return cls(_read(os.fspath(source)), name, log_level=log_level)

    @property
    def loaded(self) -> bool:
        """Whether it is in the kernel."""
        return self._loaded

    # Before the load

    def resize(self, name: str, max_entries: int) -> None:
        """Set how many entries a map can hold.

        Raises:
            BpfError: There is no such map, the object is loaded, or the number is no size for it.
        """
        with self._lock:
            self._check_unloaded(f"map {name!r} cannot be resized")
            wanted = self.maps[name]
            if not 0 < max_entries < 1 << 32:
                raise BpfError(
                    f"map {name!r} cannot hold {max_entries} entries",
                    why="a size is 1 to 4294967295 entries",
                    remedy="give another size",
                )
            handle = self._map_handles[name]
            result = self._library.bpf_map__set_max_entries(handle, max_entries)
            if result < 0:
                raise BpfError(
                    f"cannot resize map {name!r} to {max_entries} entries",
                    errno=-result,
                    remedy="check the size against what the map's type takes: a ring needs a power of two of whole pages",
                )
            wanted._definition = self._define(name, handle)

    def reuse(self, name: str, existing: Map) -> None:
        """Share a map that exists instead of making a new one; its size stays as it is.

        Raises:
            ObjectError: Its type, its sizes or its layout differ; nothing is changed.
        """
        with self._lock:
            self._check_unloaded(f"map {name!r} cannot be replaced")
            wanted = self.maps[name]
            self._check_same(wanted, existing)
            result = self._library.bpf_map__reuse_fd(self._map_handles[name], existing.fd)
            if result < 0:
                raise BpfError(
                    f"cannot reuse map {existing.name!r} as {name!r}",
                    errno=-result,
                    remedy="open the map again, and the object",
                )
            wanted._definition = self._define(name, self._map_handles[name])

    def leave_out(self, *programs: str) -> None:
        """Do not load these programs."""
        with self._lock:
            self._check_unloaded("programs cannot be left out")
            for name in programs:
                _ = self.programs[name]
                self._library.bpf_program__set_autoload(self._program_handles[name], False)

    def only(self, *programs: str) -> None:
        """Load these programs and no others."""
        for name in programs:
            _ = self.programs[name]
        self.leave_out(*(name for name in self.programs if name not in programs))

    def expect_attach_type(self, program: str, attach_type: int) -> None:
        """Set a program's expected attach type (a ``BPF_*`` number of ``enum bpf_attach_type``)."""
        with self._lock:
            self._check_unloaded("the expected attach type cannot be set")
            _ = self.programs[program]
            if not 0 <= attach_type < 1 << 31:
                raise BpfError(
                    f"there is no attach type {attach_type}", remedy="bpf.AttachType has the kernel's"
                )
            self._library.bpf_program__set_expected_attach_type(self._program_handles[program], attach_type)
            self.programs[program].expected_attach_type = attach_type

    def set_attach_target(self, program: str, function: str, target: Program | None = None) -> None:
        """Say what a ``fentry``, ``fexit``, ``fmod_ret``, ``tp_btf``, ``lsm`` or ``freplace`` program attaches to.

        Args:
            program: Its name.
            function: The kernel's function, raw tracepoint or LSM hook; or, with `target`, that program's.
            target: The loaded program whose function is traced or replaced.

        Raises:
            BpfError: There is no such function among the kernel's types, or the object is loaded.
        """
        with self._lock:
            self._check_unloaded(f"the target of program {program!r} cannot be set")
            _ = self.programs[program]
            if "\0" in function:
                raise BpfError(f"program {program!r} cannot attach to {function!r}", why="it is no name")
            with _libbpf.messages() as said:
                result = self._library.bpf_program__set_attach_target(
                    self._program_handles[program], target.fd if target is not None else 0, function.encode()
                )
            if result < 0:
                raise BpfError(
                    f"program {program!r} cannot attach to {function!r}",
                    errno=-result,
                    why="; ".join(said) or _libbpf.error_text(-result),
                    remedy="bpftool btf dump file /sys/kernel/btf/vmlinux lists the kernel's functions",
                )

    def load(self) -> Self:
        """Make the maps and load the programs. On failure nothing stays behind, and the object is closed.

        Raises:
            VerifierError: The verifier refused a program.
            NotPermitted: A capability is missing.
            FeatureMissing: The kernel lacks a map or program type, or BTF.
            ObjectError: libbpf refused the object.
        """
        with self._lock:
            self._check_unloaded(f"{self.name} cannot be loaded")
            try:
                self._separate_logs()
                with _libbpf.messages() as said, _syscall.signals_held():
                    result = self._library.bpf_object__load(self._handle)
                if result < 0:
                    raise self._load_failure(-result, said)
                self._take_over()
            except OSError as error:
                # No descriptor may be left to import by.
                self.close()
                from hookline.bpf._objects import _refusal

                raise _refusal.circumstance(f"cannot load {self.name}", error.errno or 0) from None
            finally:
                if not self._loaded:
                    self.close()
        return self

    def ring(self, name: str, record: str | npt.DTypeLike | None = None, *, lost: str | None = None) -> Ring:
        """Read a ring buffer of the loaded object; the reader is the caller's to close.

        Args:
            name: The map.
            record: The name of the struct that each record is, or a dtype; None for records of any size.
            lost: The map that counts lost records; ``NAME_lost`` where the object has it.

        Raises:
            BpfError: There is no such map or struct, the map is no ring buffer, or somebody reads it already.
        """
        if lost is None and f"{name}_lost" in self.maps:
            lost = f"{name}_lost"
        return self.maps[name].ring(record, lost=self.maps[lost] if lost else None)

    def close(self) -> None:
        """Close the programs and maps and free everything; closing twice is no error.

        Where another thread is loading the object, it is closed after that.
        """
        with self._lock:
            self._release()
            for program in self.programs.values():
                program.close()
            for made in self.maps.values():
                made.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self._release()

    def __repr__(self) -> str:
        return f"<Object {self.name!r}: {len(self.programs)} programs, {len(self.maps)} maps>"

    # libbpf's side

    def _open(self, name: str) -> int:
        options = _libbpf.OpenOptions(
            sz=ctypes.sizeof(_libbpf.OpenOptions),
            object_name=name.encode(errors="surrogateescape"),
            kernel_log_buf=_place(self._log),
            kernel_log_size=_LOG_BYTES,
            kernel_log_level=self._log_level,
        )
        with _libbpf.messages() as said:
            handle = self._library.bpf_object__open_mem(self._data, len(self._data), ctypes.byref(options))
            errno = ctypes.get_errno()
        if not handle:
            from hookline.bpf._objects import _refusal

            unresolved = _refusal.unresolved_at_open(name, said)
            if unresolved is not None:
                raise unresolved
            raise ObjectError(
                f"libbpf cannot open {name}",
                errno=0,
                why="; ".join(said) or _libbpf.error_text(errno),
                remedy="compile it again with clang -O2 -g -target bpf",
            )
        return int(handle)

    def _release(self) -> None:
        """Free libbpf's object; descriptors taken over from it stay."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self.constants._seal(f"the object is {'loaded' if self._loaded else 'closed'}")
            self._library.bpf_object__close(handle)
            for log in (self._log, *self._logs.values()):
                log.close()

    def _take_over(self) -> None:
        """Duplicate what libbpf loaded, and free libbpf's object."""
        for name, program in self.programs.items():
            fd = self._library.bpf_program__fd(self._program_handles[name])
            if fd >= 0:
                program._fd = os.dup(fd)
        for name, made in self.maps.items():
            fd = self._library.bpf_map__fd(self._map_handles[name])
            if fd >= 0:
                made._fd = os.dup(fd)
                made._loaded(made._fd)
        self.log = "".join(map(_text, self._logs.values())) or _text(self._log)
        self._loaded = True
        self._release()

    def _separate_logs(self) -> None:
        """Where logs are asked for, give each program its own: libbpf empties the common one for each."""
        if not self._log_level:
            return
        for name, handle in self._program_handles.items():
            if self._library.bpf_program__autoload(handle):
                self._logs[name] = _new_log()
                self._library.bpf_program__set_log_buf(handle, _place(self._logs[name]), _LOG_BYTES)

    def _read_btf(self) -> Btf:
        """The object's BTF as libbpf completed it: sections have their sizes, variables their offsets."""
        size = ctypes.c_uint32()
        types = self._library.bpf_object__btf(self._handle)
        # libbpf goes on without BTF that it cannot read, and its functions take no NULL.
        place = self._library.btf__raw_data(types, ctypes.byref(size)) if types else None
        if not place:
            raise ObjectError(
                f"{self.name} has no type information (BTF)",
                why="libbpf found none that it can read",
                remedy="compile it again with clang -O2 -g -target bpf",
            )
        return Btf(ctypes.string_at(place, size.value))

    def _list_programs(self) -> dict[str, Program]:
        found = {}
        handle = self._library.bpf_object__next_program(self._handle, None)
        while handle:
            name = self._library.bpf_program__name(handle).decode(errors="replace")
            section = self._library.bpf_program__section_name(handle).decode(errors="replace")
            newer = _sections.newer(section)
            if newer is not None:
                number, attach_type, flags = newer
                self._library.bpf_program__set_type(handle, number)
                self._library.bpf_program__set_expected_attach_type(handle, attach_type)
                self._library.bpf_program__set_flags(handle, flags)
            kind = _syscall.name_of(_syscall.PROGRAM_TYPES, self._library.bpf_program__type(handle))
            self._program_handles[name] = handle
            expected = self._library.bpf_program__expected_attach_type(handle)
            found[name] = Program(None, name, kind, section, expected_attach_type=expected)
            handle = self._library.bpf_object__next_program(self._handle, handle)
        return found

    def _list_maps(self) -> dict[str, Map]:
        found = {}
        handle = self._library.bpf_object__next_map(self._handle, None)
        while handle:
            name = self._library.bpf_map__name(handle).decode(errors="replace")
            if self._library.bpf_map__is_internal(handle):
                name = name[name.index(".") :] if "." in name else name
                self._check_section(name, handle)
                if name.startswith(".rodata"):
                    self._add_constants(name, handle)
            self._map_handles[name] = handle
            self._place_arena(handle)
            found[name] = Map(self._define(name, handle))
            handle = self._library.bpf_object__next_map(self._handle, handle)
        return found

    def _place_arena(self, handle: int) -> None:
        """Give an arena its address: libbpf before 1.4 does not, and the verifier wants one."""
        library = self._library
        kind = _syscall.name_of(_syscall.MAP_TYPES, library.bpf_map__type(handle))
        if kind == "arena" and not library.bpf_map__map_extra(handle):
            from hookline.bpf._maps import _arena

            library.bpf_map__set_map_extra(handle, _arena.new_address())

    def _add_constants(self, name: str, handle: int) -> None:
        type_id = self._library.bpf_map__btf_value_type_id(handle)
        size = ctypes.c_size_t()
        place = self._library.bpf_map__initial_value(handle, ctypes.byref(size))
        if not type_id or not place:
            return
        dtype = self.btf.section(type_id, volatile=True)
        if dtype.itemsize != size.value:
            raise self._damaged_section(name, dtype.itemsize, size.value)
        memory = np.ctypeslib.as_array(ctypes.cast(place, ctypes.POINTER(ctypes.c_uint8)), (size.value,))
        self.constants._add(memory, dtype)

    def _check_section(self, name: str, handle: int) -> None:
        """Refuse a section of variables whose types speak of other memory than it has."""
        type_id = self._library.bpf_map__btf_value_type_id(handle)
        size = self._library.bpf_map__value_size(handle)
        if type_id and (self.btf[type_id].kind is not Kind.DATASEC or self.btf[type_id].size != size):
            raise self._damaged_section(name, self.btf[type_id].size, size)

    def _damaged_section(self, name: str, told: int, size: int) -> ObjectError:
        return ObjectError(
            f"{self.name} is damaged",
            why=f"its types (BTF) give section {name} {told} bytes, and it has {size}",
            remedy="compile it again with clang -O2 -g -target bpf",
        )

    def _define(self, name: str, handle: int) -> MapDefinition:
        library = self._library
        btf = self.btf
        return MapDefinition(
            name=name,
            type=_syscall.name_of(_syscall.MAP_TYPES, library.bpf_map__type(handle)),
            key_size=library.bpf_map__key_size(handle),
            value_size=library.bpf_map__value_size(handle),
            max_entries=library.bpf_map__max_entries(handle),
            flags=library.bpf_map__map_flags(handle),
            extra=library.bpf_map__map_extra(handle),
            id=0,
            btf=lambda: btf,
            key_type_id=library.bpf_map__btf_key_type_id(handle),
            value_type_id=library.bpf_map__btf_value_type_id(handle),
        )

    def _check_unloaded(self, what: str) -> None:
        if self._handle is None:
            state = "loaded already" if self._loaded else "closed"
            raise BpfError(
                what, why=f"{self.name} is {state}", remedy="open the object anew, and do it before load()"
            )

    def _check_same(self, wanted: Map, existing: Map) -> None:
        """Raise unless a program compiled for one map can use the other."""
        ours, theirs = wanted.definition, existing.definition
        for what in ("type", "key_size", "value_size", "flags"):
            if getattr(ours, what) != getattr(theirs, what):
                why = f"its {what} is {getattr(theirs, what)}, and {self.name} wants {getattr(ours, what)}"
                break
        else:
            if not theirs.value_type_id or _laid_out_alike(wanted, existing):
                return
            why = "the members of its key or value are laid out differently"
        raise ObjectError(
            f"map {existing.name!r} cannot be reused as {wanted.name!r}",
            why=why,
            remedy="it was made by another version: detach and remove it, or migrate its entries",
        )

    def _load_failure(self, errno: int, said: list[str]) -> BpfError:
        from hookline.bpf._objects import _refusal

        types = frozenset(
            program.type
            for name, program in self.programs.items()
            if self._library.bpf_program__autoload(self._program_handles[name])
        )
        definitions = {name: one.definition for name, one in self.maps.items()}
        log = _text(self._logs.get(_refusal.refused_program(said), self._log))
        return _refusal.explain(_refusal.Failure(self.name, errno, said, log, self._data, types, definitions))


def _laid_out_alike(wanted: Map, existing: Map) -> bool:
    """Whether keys and values have the same members at the same places."""
    try:
        return (wanted.key_dtype, wanted.value_dtype) == (existing.key_dtype, existing.value_dtype)
    except BpfError:
        # NumPy has no dtype for bitfields.
        return _layouts(wanted.definition) == _layouts(existing.definition)


def _layouts(definition: MapDefinition) -> tuple[object, object]:
    types = definition.btf()
    if types is None:
        return None, None
    return types.layout(definition.key_type_id), types.layout(definition.value_type_id)


def _new_log() -> mmap.mmap:
    return mmap.mmap(-1, _LOG_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _place(log: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(log))


def _text(log: mmap.mmap) -> str:
    return log[: log.find(b"\0")].decode(errors="replace")


def _read(path: str) -> bytes:
    """A file that can be an object: a regular one, of no more than `_LARGEST` bytes.

    Raises:
        ObjectError: It is none, or cannot be read.
    """
    what = f"cannot read {path!r}"
    try:
        # Nobody waits for a pipe's writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                why = "it is no regular file but a device, pipe or socket"
                raise ObjectError(what, errno=errnos.EINVAL, why=why, remedy="name the object's file")
            if status.st_size > _LARGEST:
                why = f"it has {status.st_size} bytes, and no object has more than {_LARGEST}"
                raise ObjectError(what, errno=errnos.EFBIG, why=why, remedy="name the object's file")
            return file.read(_LARGEST)
    except OSError as error:
        remedy = {
            errnos.EISDIR: "name the object's file in it, such as count.bpf.o",
            errnos.EACCES: "let this user read it: ls -l",
        }.get(error.errno or 0, "check the path; hookline programs build FILE.bpf.c makes an object")
        raise ObjectError(what, errno=error.errno or 0, remedy=remedy) from None
    except ValueError:
        why = "a path has no zero byte"
        raise ObjectError(what, errno=errnos.EINVAL, why=why, remedy="leave it out") from None


class _Named(Mapping[str, _Item]):
    """A read-only mapping whose KeyError says what there is."""

    def __init__(self, kind: str, owner: str, items: dict[str, _Item]) -> None:
        self._kind = kind
        self._owner = owner
        self._items = items

    def __getitem__(self, name: str) -> _Item:
        if name not in self._items:
            raise unknown_name(self._kind, name, list(self._items), self._owner)
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)
