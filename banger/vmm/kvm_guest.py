"""A guest of a few hundred bytes that does what a kernel does first. Run as a program, by `kvm`.

It enters 64-bit mode, loads its descriptor tables, takes a breakpoint through its IDT, goes to
ring 3 and comes back by a system call; after each of these it writes a number to an I/O port. The
verdict is one JSON object on standard output. Standard library only.

Sources: Linux Documentation/virt/kvm/api.rst and arch/x86/include/uapi/asm/kvm.h (ioctls and
structures); Intel SDM volume 3, chapters 3 (descriptors), 4.5 (paging), 6.14 (64-bit IDT).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import signal
import struct
import sys

TIMEOUT_S = 2.0

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90

KVM_API_VERSION = 12
CPUID_ENTRIES, CPUID_ENTRY_BYTES = 200, 40
TSS_PAGES = 0x7FF00000  # three pages that VMX wants somewhere outside of the guest's memory

EXIT_IO, EXIT_HALT = 2, 5
EXIT_NAMES = {6: "MMIO", 8: "SHUTDOWN", 9: "FAIL_ENTRY", 17: "INTERNAL_ERROR"}
RUN_EXIT_REASON, RUN_IO = 8, 32  # offsets in struct kvm_run
MAX_EXITS = 40

# The guest's memory, mapped one to one.
MEMORY_BYTES = 1 << 20
PML4, PDPT, PD = 0x1000, 0x2000, 0x3000
KERNEL_STACK, USER_STACK = 0x6000, 0x7000
MAIN, FAR_RETURN, BREAKPOINT, USER, SYSCALL = 0x8000, 0x8100, 0x8200, 0x8300, 0x8400
GDT, IDT, TSS, GDT_POINTER, IDT_POINTER = 0x9000, 0xA000, 0xB000, 0xC000, 0xC010
IDT_BYTES, TSS_BYTES = 0x1000, 0x68

KERNEL_CODE, KERNEL_DATA, USER_DATA, USER_CODE, TASK = 0x08, 0x10, 0x18, 0x20, 0x28
RING_3 = 3
GDT_ENTRIES = (
    0,
    0x00AF9B000000FFFF,  # KERNEL_CODE: 64-bit, ring 0
    0x00CF93000000FFFF,  # KERNEL_DATA
    0x00CFF3000000FFFF,  # USER_DATA: ring 3; sysret's order, data before code
    0x00AFFB000000FFFF,  # USER_CODE: 64-bit, ring 3
    0x0000890000000067 | TSS << 16,  # TASK: available 64-bit TSS, 16 bytes long
    0,
)
INTERRUPT_GATE = 0x8E
VECTOR_BREAKPOINT = 3

PORT = 0x42
STAGES = ("long mode", "descriptor tables", "breakpoint", "ring 3 and system call")


def word(value: int) -> str:
    """Give 32 bits as an instruction holds them."""
    return struct.pack("<I", value).hex()


def report(stage: int) -> str:
    """Give `mov al, stage; out PORT, al`."""
    return f"b0{stage:02x} e6{PORT:02x}"


def write_msr(msr: int, low: int, high: int = 0) -> str:
    """Give `mov ecx, msr; mov eax, low; mov edx, high; wrmsr`."""
    return f"b9{word(msr)} b8{word(low)} ba{word(high)} 0f30"


MSR_EFER, MSR_STAR, MSR_LSTAR, MSR_FMASK = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000084
# Bits 47:32 are the selector that syscall loads, 63:48 the one that sysret counts from.
STAR_HIGH = KERNEL_DATA << 16 | KERNEL_CODE

LISTING = {
    MAIN: (
        report(1),  # the first instruction ran in 64-bit mode
        f"bc{word(KERNEL_STACK)}",  # mov esp, KERNEL_STACK
        f"0f011425{word(GDT_POINTER)}",  # lgdt [GDT_POINTER]
        f"0f011c25{word(IDT_POINTER)}",  # lidt [IDT_POINTER]
        "0f20d8 0f22d8",  # mov rax, cr3; mov cr3, rax
        f"6a{KERNEL_CODE:02x}",  # push KERNEL_CODE
        f"68{word(FAR_RETURN)}",  # push FAR_RETURN
        "48cb",  # retfq: loads cs from our GDT
    ),
    FAR_RETURN: (
        f"b8{word(KERNEL_DATA)} 8ed0",  # mov eax, KERNEL_DATA; mov ss, eax
        report(2),
        f"b8{word(TASK)} 0f00d8",  # mov eax, TASK; ltr ax
        "cc",  # int3: to BREAKPOINT and back
        f"b9{word(MSR_EFER)} 0f32 83c801 0f30",  # EFER |= SCE, which enables syscall
        write_msr(MSR_STAR, 0, STAR_HIGH),
        write_msr(MSR_LSTAR, SYSCALL),
        write_msr(MSR_FMASK, 0),
        f"6a{USER_DATA | RING_3:02x} 68{word(USER_STACK)}",  # push ss, rsp
        "6a02",  # push rflags: only the bit that is always set
        f"6a{USER_CODE | RING_3:02x} 68{word(USER)}",  # push cs, rip
        "48cf",  # iretq: to ring 3
    ),
    BREAKPOINT: (
        report(3),
        "48cf",  # iretq
    ),
    USER: ("0f05",),  # syscall
    SYSCALL: (
        f"bc{word(KERNEL_STACK)}",  # mov esp, KERNEL_STACK
        report(4),
        f"b8{word(USER)} 0f0138",  # mov eax, USER; invlpg [rax]
        "31c0 0fa2",  # xor eax, eax; cpuid
        "f4",  # hlt
    ),
}


class Segment(ctypes.Structure):
    """A loaded segment register: struct kvm_segment."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl")),
        ("unusable", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
    )


class Table(ctypes.Structure):
    """A descriptor table register: struct kvm_dtable."""

    _fields_ = (("base", ctypes.c_uint64), ("limit", ctypes.c_uint16), ("padding", ctypes.c_uint16 * 3))


class SpecialRegisters(ctypes.Structure):
    """What a mode consists of: struct kvm_sregs."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, Table) for name in ("gdt", "idt")),
        *((name, ctypes.c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    )


class Registers(ctypes.Structure):
    """The general registers: struct kvm_regs."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")),
        ("r8_to_r15", ctypes.c_uint64 * 8),
        ("rip", ctypes.c_uint64),
        ("rflags", ctypes.c_uint64),
    )


def page_tables() -> dict[int, bytes]:
    """Map the first 2 MiB one to one, for ring 3 too: one entry in each of three levels."""
    present_writable_user = 0b111
    large_page = 1 << 7
    return {
        PML4: struct.pack("<Q", PDPT | present_writable_user),
        PDPT: struct.pack("<Q", PD | present_writable_user),
        PD: struct.pack("<Q", large_page | present_writable_user),
    }


def descriptor_tables() -> dict[int, bytes]:
    """Give the GDT, an IDT with one gate, the TSS with ring 0's stack, and the tables' pointers."""
    gate = struct.pack(
        "<HHBBHII", BREAKPOINT & 0xFFFF, KERNEL_CODE, 0, INTERRUPT_GATE, BREAKPOINT >> 16, 0, 0
    )
    return {
        GDT: struct.pack(f"<{len(GDT_ENTRIES)}Q", *GDT_ENTRIES),
        IDT + VECTOR_BREAKPOINT * len(gate): gate,
        TSS: struct.pack("<IQ", 0, KERNEL_STACK - 0x800),
        GDT_POINTER: struct.pack("<HQ", len(GDT_ENTRIES) * 8 - 1, GDT),
        IDT_POINTER: struct.pack("<HQ", IDT_BYTES - 1, IDT),
    }


def code() -> dict[int, bytes]:
    """Assemble the listing."""
    return {address: bytes.fromhex(" ".join(lines)) for address, lines in LISTING.items()}


def enter_long_mode(special: SpecialRegisters) -> None:
    """Set the registers as a boot loader leaves them: paging, 64-bit code, flat data."""
    flat = {"limit": 0xFFFFFFFF, "present": 1, "s": 1, "g": 1}
    special.cs = Segment(selector=KERNEL_CODE, type=11, l=1, **flat)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(special, name, Segment(selector=KERNEL_DATA, type=3, db=1, **flat))
    special.tr = Segment(selector=TASK, base=TSS, limit=TSS_BYTES - 1, type=11, present=1)
    special.ldt = Segment(type=2, present=1, unusable=1)
    special.cr0 = 0x80010033  # PG WP NE ET MP PE
    special.cr3 = PML4
    special.cr4 = 0x220  # OSFXSR PAE
    special.efer = 0x500  # LMA LME


class Guest:
    """One virtual machine with one CPU, ready to run the listing."""

    def __init__(self) -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        version = fcntl.ioctl(kvm, KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            raise OSError(f"KVM speaks version {version}, not {KVM_API_VERSION}")
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        fcntl.ioctl(vm, KVM_SET_TSS_ADDR, TSS_PAGES)
        self.memory = self._give_memory(vm)
        self.cpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
        self.shared = mmap.mmap(self.cpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))
        self._give_features(kvm)
        self._give_registers()

    def _give_memory(self, vm: int) -> mmap.mmap:
        memory = mmap.mmap(-1, MEMORY_BYTES)
        for address, content in {**page_tables(), **descriptor_tables(), **code()}.items():
            memory[address : address + len(content)] = content
        host_address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        slot, flags, guest_address = 0, 0, 0
        region = struct.pack("<IIQQQ", slot, flags, guest_address, MEMORY_BYTES, host_address)
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
        return memory

    def _give_features(self, kvm: int) -> None:
        """Pass on all that the host supports: long mode and syscall are refused without."""
        features = bytearray(struct.pack("<II", CPUID_ENTRIES, 0) + bytes(CPUID_ENTRIES * CPUID_ENTRY_BYTES))
        fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, features)
        fcntl.ioctl(self.cpu, KVM_SET_CPUID2, features)

    def _give_registers(self) -> None:
        special = SpecialRegisters()
        fcntl.ioctl(self.cpu, KVM_GET_SREGS, special)
        enter_long_mode(special)
        fcntl.ioctl(self.cpu, KVM_SET_SREGS, special)
        fcntl.ioctl(self.cpu, KVM_SET_REGS, Registers(rip=MAIN, rsp=KERNEL_STACK, rflags=2))

    def run(self) -> int:
        """Run until the guest needs us; give the reason."""
        fcntl.ioctl(self.cpu, KVM_RUN, 0)
        return int(struct.unpack_from("<I", self.shared, RUN_EXIT_REASON)[0])

    def written(self) -> int:
        """Give the byte that the guest wrote to the port."""
        *_, offset = struct.unpack_from("<BBHIQ", self.shared, RUN_IO)
        return int(self.shared[offset])


def follow(guest: Guest, stages: list[str]) -> str | None:
    """Run the guest to its end and note each stage; tell what went wrong, None for nothing."""
    for _ in range(MAX_EXITS):
        reason = guest.run()
        if reason == EXIT_HALT:
            return None if stages == list(STAGES) else "it halted in a place where it should not"
        if reason != EXIT_IO:
            return f"KVM gave up with {EXIT_NAMES.get(reason, reason)}"
        stage = guest.written()
        if stage != len(stages) + 1 or stage > len(STAGES):
            return f"it reported stage {stage} out of turn"
        stages.append(STAGES[stage - 1])
    return "it does not come to its end"


def verdict() -> dict[str, object]:
    """Judge this host's KVM; the keys are those of `KvmVerdict`."""
    stages: list[str] = []
    try:
        wrong = follow(Guest(), stages)
    except TimeoutError:
        wrong = f"it hung for {TIMEOUT_S:g} s"
    except OSError as error:
        wrong = str(error)
    if wrong is None:
        return {"usable": True, "why": "KVM ran a small guest to its end.", "stages": stages}
    where = STAGES[len(stages)] if len(stages) < len(STAGES) else "the end"
    return {"usable": False, "why": f"KVM's guest failed at {where}: {wrong}.", "stages": stages}


def _too_late(*_: object) -> None:
    raise TimeoutError


if __name__ == "__main__":
    # A signal makes KVM_RUN return, so a guest that spins ends here, and its stages are told.
    signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)
    sys.stdout.write(json.dumps(verdict()))
