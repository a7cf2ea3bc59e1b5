//! The arguments of our own ioctls, laid out as `<linux/userfaultfd.h>` lays them out, and their request codes.
//!
//! The newest of them is POISON (Linux 6.6); a header of the building machine may be older than that, so nothing here
//! comes from one.

use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// The type byte of every request.
const UFFDIO: u8 = 0xAA;

/// The version of the interface, the only one there is.
pub(super) const UFFD_API: u64 = 0xAA;

/// The flag of userfaultfd(2) for faults of user code only (Linux 5.11).
pub(super) const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// The request to `/dev/userfaultfd` for a new descriptor (Linux 6.1). Its argument is a number, the flags.
pub(super) const USERFAULTFD_IOC_NEW: libc::Ioctl = nix::request_code_none!(UFFDIO, 0x00) as libc::Ioctl;

/// Declares an argument and its request code.
macro_rules! request {
    ($(#[$doc:meta])* $name:ident, $number:literal { $($field:ident: $type:ty,)+ }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub(super) struct $name {
            $(pub(super) $field: $type,)+
        }

        // SAFETY: the assertions below hold the layout and the code to the kernel's.
        unsafe impl Request for $name {
            const CODE: libc::Ioctl =
                nix::request_code_readwrite!(UFFDIO, $number, size_of::<$name>()) as libc::Ioctl;
        }
    };
}

/// The argument of an ioctl.
///
/// # Safety
///
/// The kernel must read and write no more than `size_of::<Self>()` bytes for `CODE`, laid out as `Self`.
pub(super) unsafe trait Request {
    /// The request code.
    const CODE: libc::Ioctl;
}

request! {
    /// `struct uffdio_api`: asks for a version and features; the kernel writes all that it has.
    UffdioApi, 0x3F { api: u64, features: u64, ioctls: u64, }
}

request! {
    /// `struct uffdio_copy`.
    UffdioCopy, 0x03 { dst: u64, src: u64, len: u64, mode: u64, copy: i64, }
}

request! {
    /// `struct uffdio_zeropage`.
    UffdioZeropage, 0x04 { start: u64, len: u64, mode: u64, zeropage: i64, }
}

request! {
    /// `struct uffdio_writeprotect`.
    UffdioWriteprotect, 0x06 { start: u64, len: u64, mode: u64, }
}

request! {
    /// `struct uffdio_continue`.
    UffdioContinue, 0x07 { start: u64, len: u64, mode: u64, mapped: i64, }
}

request! {
    /// `struct uffdio_poison`.
    UffdioPoison, 0x08 { start: u64, len: u64, mode: u64, updated: i64, }
}

const _: () = {
    use std::mem::offset_of;

    assert!(
        size_of::<UffdioApi>() == 24 && offset_of!(UffdioApi, features) == 8 && offset_of!(UffdioApi, ioctls) == 16
    );
    assert!(size_of::<UffdioCopy>() == 40 && offset_of!(UffdioCopy, src) == 8 && offset_of!(UffdioCopy, len) == 16);
    assert!(offset_of!(UffdioCopy, mode) == 24 && offset_of!(UffdioCopy, copy) == 32);
    assert!(size_of::<UffdioZeropage>() == 32 && offset_of!(UffdioZeropage, len) == 8);
    assert!(offset_of!(UffdioZeropage, mode) == 16 && offset_of!(UffdioZeropage, zeropage) == 24);
    assert!(size_of::<UffdioWriteprotect>() == 24 && offset_of!(UffdioWriteprotect, mode) == 16);
    assert!(size_of::<UffdioContinue>() == 32 && offset_of!(UffdioContinue, len) == 8);
    assert!(offset_of!(UffdioContinue, mode) == 16 && offset_of!(UffdioContinue, mapped) == 24);
    assert!(size_of::<UffdioPoison>() == 32 && offset_of!(UffdioPoison, len) == 8);
    assert!(offset_of!(UffdioPoison, mode) == 16 && offset_of!(UffdioPoison, updated) == 24);
};

// A few architectures arrange direction and size otherwise; nix's macros know, these literals do not.
#[cfg(not(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc",
    target_arch = "sparc64"
)))]
const _: () = {
    assert!(USERFAULTFD_IOC_NEW as u32 == 0x0000_AA00);
    assert!(UffdioApi::CODE as u32 == 0xC018_AA3F);
    assert!(UffdioCopy::CODE as u32 == 0xC028_AA03);
    assert!(UffdioZeropage::CODE as u32 == 0xC020_AA04);
    assert!(UffdioWriteprotect::CODE as u32 == 0xC018_AA06);
    assert!(UffdioContinue::CODE as u32 == 0xC020_AA07);
    assert!(UffdioPoison::CODE as u32 == 0xC020_AA08);
};

/// Does one ioctl on a userfaultfd.
///
/// # Safety
///
/// What the request does to the memory that it names must be allowed: the argument itself is the only memory of ours
/// that this function answers for.
pub(super) unsafe fn ioctl<R: Request>(fd: BorrowedFd<'_>, request: &mut R) -> Result<(), Errno> {
    // SAFETY: `request` is an exclusive reference to all the bytes that the kernel may touch for this code, by the
    // contract of `Request`; what the request names beyond that is the caller's to answer for.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), R::CODE, std::ptr::from_mut(request)) }).map(drop)
}
