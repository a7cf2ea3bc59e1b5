//! The kernel's userfaultfd interface, `<linux/userfaultfd.h>`, as far as the crate `userfaultfd` 0.9 uses it.
//!
//! **Why this exists.** The published `userfaultfd-sys` 0.6.0 runs bindgen and a C compiler over the header of the
//! machine that builds it. Bindgen needs libclang, a C compiler's innards for a page of numbers that can never change:
//! they are the kernel's binary interface. This crate has the same name and version, so that `[patch.crates-io]` puts
//! it in the published one's place; a build then needs Rust and a linker only, and no longer depends on how old the
//! header of the building machine is.
//!
//! What bindgen would have guaranteed, the assertions at the end of this file do: each size, offset, request code and
//! bit is compared with the header's value when the crate is compiled.
//!
//! Names are the kernel's. Each number has the type that the published crate gives it, because `userfaultfd` depends
//! on that: request numbers, modes, features and page-fault flags are `u64`, events and the ioctl type are `u8`.

#![no_std]
#![allow(non_camel_case_types)]

/// The version of the interface, asked for in [`uffdio_api::api`].
pub const UFFD_API: u64 = 0xAA;
/// The type byte of the ioctls of a userfaultfd.
pub const UFFDIO: u8 = 0xAA;
/// The type byte of the ioctl of `/dev/userfaultfd` (Linux 6.1).
pub const USERFAULTFD_IOC: u32 = 0xAA;
/// The flag of userfaultfd(2) for a descriptor that serves faults of user code only (Linux 5.11).
pub const UFFD_USER_MODE_ONLY: u32 = 1;

/// Number of the ioctl that registers a range.
pub const _UFFDIO_REGISTER: u64 = 0x00;
/// Number of the ioctl that ends a registration.
pub const _UFFDIO_UNREGISTER: u64 = 0x01;
/// Number of the ioctl that wakes the threads that wait in a range.
pub const _UFFDIO_WAKE: u64 = 0x02;
/// Number of the ioctl that installs copied pages.
pub const _UFFDIO_COPY: u64 = 0x03;
/// Number of the ioctl that installs zero pages.
pub const _UFFDIO_ZEROPAGE: u64 = 0x04;
/// Number of the ioctl that sets and lifts write protection (Linux 5.7).
pub const _UFFDIO_WRITEPROTECT: u64 = 0x06;
/// Number of the ioctl that maps pages which are in the page cache already (Linux 5.13).
pub const _UFFDIO_CONTINUE: u64 = 0x07;
/// Number of the handshake ioctl.
pub const _UFFDIO_API: u64 = 0x3F;

/// Write-protection faults are reported (Linux 5.7).
pub const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Forks are reported, with a descriptor for the child (Linux 4.11).
pub const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
/// Moves by mremap are reported (Linux 4.11).
pub const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
/// Pages given up by madvise are reported (Linux 4.11).
pub const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Ranges of hugetlbfs can be registered (Linux 4.11).
pub const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
/// Ranges of shared memory can be registered (Linux 4.11).
pub const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Unmapping is reported (Linux 4.11).
pub const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;
/// Faults raise SIGBUS instead of a message (Linux 4.14).
pub const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
/// Messages carry the id of the faulting thread (Linux 4.14).
pub const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;

/// Register for faults on pages that are not there.
pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
/// Register for writes to protected pages.
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// Register for faults on pages that are in the page cache but not mapped.
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
/// Let the waiting threads sleep on after a copy.
pub const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
/// Install the copied pages write-protected.
pub const UFFDIO_COPY_MODE_WP: u64 = 1 << 1;
/// Let the waiting threads sleep on after installing zero pages.
pub const UFFDIO_ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
/// Set the protection; without it the ioctl lifts it.
pub const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
/// Let the waiting threads sleep on after lifting the protection.
pub const UFFDIO_WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
/// Let the waiting threads sleep on after mapping cached pages.
pub const UFFDIO_CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;

/// A page fault.
pub const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// A fork.
pub const UFFD_EVENT_FORK: u8 = 0x13;
/// A move by mremap.
pub const UFFD_EVENT_REMAP: u8 = 0x14;
/// Pages given up by madvise.
pub const UFFD_EVENT_REMOVE: u8 = 0x15;
/// An unmapped range.
pub const UFFD_EVENT_UNMAP: u8 = 0x16;

/// The fault was a write.
pub const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
/// The fault was a write to a protected page.
pub const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
/// The page is in the page cache.
pub const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// The handshake: what is asked for, overwritten by what there is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffdio_api {
    /// Always [`UFFD_API`].
    pub api: u64,
    /// In: the features to enable. Out: all features of the kernel.
    pub features: u64,
    /// Out: the ioctls that the descriptor itself answers to.
    pub ioctls: u64,
}

/// A range of addresses in whole pages.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffdio_range {
    /// Its first byte.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// A registration.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffdio_register {
    /// The range to register.
    pub range: uffdio_range,
    /// `UFFDIO_REGISTER_MODE_*`.
    pub mode: u64,
    /// Out: the ioctls that the range answers to.
    pub ioctls: u64,
}

/// An order to install copied pages.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffdio_copy {
    /// Where to.
    pub dst: u64,
    /// Where from, in the caller's memory.
    pub src: u64,
    /// How many bytes.
    pub len: u64,
    /// `UFFDIO_COPY_MODE_*`.
    pub mode: u64,
    /// Out: bytes installed, or a negative errno.
    pub copy: i64,
}

/// An order to install zero pages.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffdio_zeropage {
    /// Where to.
    pub range: uffdio_range,
    /// `UFFDIO_ZEROPAGE_MODE_*`.
    pub mode: u64,
    /// Out: bytes installed, or a negative errno.
    pub zeropage: i64,
}

/// An order to set or lift write protection.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffdio_writeprotect {
    /// Which pages.
    pub range: uffdio_range,
    /// `UFFDIO_WRITEPROTECT_MODE_*`.
    pub mode: u64,
}

/// An order to map pages of the page cache.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffdio_continue {
    /// Which pages.
    pub range: uffdio_range,
    /// `UFFDIO_CONTINUE_MODE_*`.
    pub mode: u64,
    /// Out: bytes mapped, or a negative errno.
    pub mapped: i64,
}

/// One message, as read(2) delivers it.
///
/// The kernel declares it packed, so a buffer of messages needs no alignment.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct uffd_msg {
    /// `UFFD_EVENT_*`: it says which member of [`uffd_msg::arg`] holds.
    pub event: u8,
    /// Always zero.
    pub reserved1: u8,
    /// Always zero.
    pub reserved2: u16,
    /// Always zero.
    pub reserved3: u32,
    /// What happened.
    pub arg: uffd_msg_arg,
}

/// What a message tells, by its event.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_arg {
    /// With [`UFFD_EVENT_PAGEFAULT`].
    pub pagefault: uffd_msg_pagefault,
    /// With [`UFFD_EVENT_FORK`].
    pub fork: uffd_msg_fork,
    /// With [`UFFD_EVENT_REMAP`].
    pub remap: uffd_msg_remap,
    /// With [`UFFD_EVENT_REMOVE`] and [`UFFD_EVENT_UNMAP`].
    pub remove: uffd_msg_remove,
    /// The room that every message has.
    pub reserved: uffd_msg_reserved,
}

/// A page fault.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_pagefault {
    /// `UFFD_PAGEFAULT_FLAG_*`.
    pub flags: u64,
    /// Where: the start of the page, unless the exact address was asked for.
    pub address: u64,
    /// What features add.
    pub feat: uffd_msg_pagefault_feat,
}

/// What features add to a page fault.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_pagefault_feat {
    /// With [`UFFD_FEATURE_THREAD_ID`]: the thread's id; otherwise zero.
    pub ptid: u32,
}

/// A fork.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_fork {
    /// The descriptor of the child's userfaultfd, in the reader's table.
    pub ufd: u32,
}

/// A move by mremap.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_remap {
    /// Where the range was.
    pub from: u64,
    /// Where it is.
    pub to: u64,
    /// Its length before the move, in bytes.
    pub len: u64,
}

/// A range that was given up or unmapped.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_remove {
    /// Its first byte.
    pub start: u64,
    /// The byte after its last.
    pub end: u64,
}

/// The room that every message has.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_reserved {
    /// Unused.
    pub reserved1: u64,
    /// Unused.
    pub reserved2: u64,
    /// Unused.
    pub reserved3: u64,
}

/// What the header's macros and the C compiler make of it all, compared with the above.
mod assertions {
    use super::*;
    use core::mem::{align_of, offset_of, size_of};

    const _: () = {
        assert!(size_of::<uffdio_api>() == 24 && offset_of!(uffdio_api, ioctls) == 16);
        assert!(size_of::<uffdio_range>() == 16 && offset_of!(uffdio_range, len) == 8);
        assert!(size_of::<uffdio_register>() == 32 && offset_of!(uffdio_register, mode) == 16);
        assert!(offset_of!(uffdio_register, ioctls) == 24);
        assert!(size_of::<uffdio_copy>() == 40 && offset_of!(uffdio_copy, src) == 8);
        assert!(offset_of!(uffdio_copy, len) == 16 && offset_of!(uffdio_copy, mode) == 24);
        assert!(offset_of!(uffdio_copy, copy) == 32);
        assert!(size_of::<uffdio_zeropage>() == 32 && offset_of!(uffdio_zeropage, zeropage) == 24);
        assert!(size_of::<uffdio_writeprotect>() == 24 && offset_of!(uffdio_writeprotect, mode) == 16);
        assert!(size_of::<uffdio_continue>() == 32 && offset_of!(uffdio_continue, mapped) == 24);

        assert!(size_of::<uffd_msg>() == 32 && align_of::<uffd_msg>() == 1);
        assert!(offset_of!(uffd_msg, arg) == 8 && size_of::<uffd_msg_arg>() == 24);
        assert!(offset_of!(uffd_msg_pagefault, address) == 8 && offset_of!(uffd_msg_pagefault, feat) == 16);
        assert!(offset_of!(uffd_msg_remap, to) == 8 && offset_of!(uffd_msg_remap, len) == 16);
        assert!(offset_of!(uffd_msg_remove, end) == 8);
    };

    /// Puts a request code together as `_IOC()` does: direction, size, type, number.
    ///
    /// Alpha, MIPS, PowerPC and SPARC arrange it otherwise; the callers get theirs from nix, which knows.
    const fn request(direction: u64, number: u64, size: usize) -> u64 {
        direction << 30 | (size as u64) << 16 | (UFFDIO as u64) << 8 | number
    }

    /// The kernel only writes the argument, says the request code (the header owns that this is the wrong way round).
    const READ: u64 = 2;
    /// The kernel reads and writes the argument.
    const READ_WRITE: u64 = 3;

    const _: () = {
        assert!(request(READ_WRITE, _UFFDIO_API, size_of::<uffdio_api>()) == 0xC018_AA3F);
        assert!(request(READ_WRITE, _UFFDIO_REGISTER, size_of::<uffdio_register>()) == 0xC020_AA00);
        assert!(request(READ, _UFFDIO_UNREGISTER, size_of::<uffdio_range>()) == 0x8010_AA01);
        assert!(request(READ, _UFFDIO_WAKE, size_of::<uffdio_range>()) == 0x8010_AA02);
        assert!(request(READ_WRITE, _UFFDIO_COPY, size_of::<uffdio_copy>()) == 0xC028_AA03);
        assert!(request(READ_WRITE, _UFFDIO_ZEROPAGE, size_of::<uffdio_zeropage>()) == 0xC020_AA04);
        assert!(request(READ_WRITE, _UFFDIO_WRITEPROTECT, size_of::<uffdio_writeprotect>()) == 0xC018_AA06);
        assert!(request(READ_WRITE, _UFFDIO_CONTINUE, size_of::<uffdio_continue>()) == 0xC020_AA07);
        assert!((USERFAULTFD_IOC as u64) << 8 == 0xAA00);
    };

    const _: () = {
        assert!(UFFD_API == 0xAA && UFFD_USER_MODE_ONLY == 1);

        assert!(UFFD_FEATURE_PAGEFAULT_FLAG_WP == 0x1);
        assert!(UFFD_FEATURE_EVENT_FORK == 0x2);
        assert!(UFFD_FEATURE_EVENT_REMAP == 0x4);
        assert!(UFFD_FEATURE_EVENT_REMOVE == 0x8);
        assert!(UFFD_FEATURE_MISSING_HUGETLBFS == 0x10);
        assert!(UFFD_FEATURE_MISSING_SHMEM == 0x20);
        assert!(UFFD_FEATURE_EVENT_UNMAP == 0x40);
        assert!(UFFD_FEATURE_SIGBUS == 0x80);
        assert!(UFFD_FEATURE_THREAD_ID == 0x100);

        assert!(UFFDIO_REGISTER_MODE_MISSING == 1 && UFFDIO_REGISTER_MODE_WP == 2 && UFFDIO_REGISTER_MODE_MINOR == 4);
        assert!(UFFDIO_COPY_MODE_DONTWAKE == 1 && UFFDIO_COPY_MODE_WP == 2);
        assert!(UFFDIO_ZEROPAGE_MODE_DONTWAKE == 1 && UFFDIO_CONTINUE_MODE_DONTWAKE == 1);
        assert!(UFFDIO_WRITEPROTECT_MODE_WP == 1 && UFFDIO_WRITEPROTECT_MODE_DONTWAKE == 2);

        assert!(UFFD_EVENT_PAGEFAULT == 0x12 && UFFD_EVENT_FORK == 0x13 && UFFD_EVENT_REMAP == 0x14);
        assert!(UFFD_EVENT_REMOVE == 0x15 && UFFD_EVENT_UNMAP == 0x16);
        assert!(UFFD_PAGEFAULT_FLAG_WRITE == 1 && UFFD_PAGEFAULT_FLAG_WP == 2 && UFFD_PAGEFAULT_FLAG_MINOR == 4);
    };
}
