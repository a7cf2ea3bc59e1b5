//! The two sets of bits that the kernel answers with: features of a userfaultfd, ioctls of a range.

use std::fmt;
use std::ops::BitOr;

/// Names one bit of a set, as the kernel's header does, with the Linux version that brought it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named<T> {
    /// The set that holds this bit only.
    pub flag: T,
    /// The kernel's name, without its prefix.
    pub name: &'static str,
    /// The first Linux version that has it.
    pub since: &'static str,
}

/// Declares a set of bits: its type, a constant for each bit, their table, and the arithmetic.
macro_rules! flag_set {
    (
        $(#[$set_doc:meta])* $set:ident;
        $($(#[$doc:meta])* $name:ident = $bit:literal, $since:literal;)+
    ) => {
        $(#[$set_doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $set(u64);

        impl $set {
            $($(#[$doc])* pub const $name: $set = $set(1 << $bit);)+

            /// Every bit that this library knows by name, lowest first.
            pub const ALL: &'static [Named<$set>] =
                &[$(Named { flag: $set::$name, name: stringify!($name), since: $since }),+];

            /// Returns the empty set.
            pub const fn empty() -> $set {
                $set(0)
            }

            /// Takes the kernel's number; bits that this library has no name for are kept.
            pub const fn from_bits(bits: u64) -> $set {
                $set(bits)
            }

            /// Returns the kernel's number.
            pub const fn bits(self) -> u64 {
                self.0
            }

            /// Tells whether no bit is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// Tells whether all bits of `other` are set.
            pub const fn contains(self, other: $set) -> bool {
                self.0 & other.0 == other.0
            }

            /// Returns the bits of either set.
            pub const fn union(self, other: $set) -> $set {
                $set(self.0 | other.0)
            }

            /// Returns the bits of this set that `other` lacks.
            pub const fn difference(self, other: $set) -> $set {
                $set(self.0 & !other.0)
            }

            /// Lists the bits that are set and have a name, lowest first.
            pub fn named(self) -> impl Iterator<Item = &'static Named<$set>> {
                Self::ALL.iter().filter(move |known| self.contains(known.flag))
            }

            /// Lists the kernel's names of the bits that are set, lowest first.
            pub fn names(self) -> impl Iterator<Item = &'static str> {
                self.named().map(|known| known.name)
            }
        }

        impl BitOr for $set {
            type Output = $set;

            fn bitor(self, other: $set) -> $set {
                self.union(other)
            }
        }

        /// Writes the kernel's names, and bits without a name as one number.
        impl fmt::Display for $set {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                if self.is_empty() {
                    return f.write_str("(none)");
                }
                let mut rest = *self;
                for known in self.named() {
                    let separator = if rest == *self { "" } else { " | " };
                    write!(f, "{separator}{}", known.name)?;
                    rest = rest.difference(known.flag);
                }
                if !rest.is_empty() {
                    let separator = if rest == *self { "" } else { " | " };
                    write!(f, "{separator}{:#x}", rest.0)?;
                }
                Ok(())
            }
        }

        impl fmt::Debug for $set {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

flag_set! {
    /// A set of userfaultfd features, by their kernel names without `UFFD_FEATURE_`.
    Features;
    /// Writes to protected pages can be reported.
    PAGEFAULT_FLAG_WP = 0, "5.7";
    /// Forks are reported; asking for it needs `CAP_SYS_PTRACE`.
    EVENT_FORK = 1, "4.11";
    /// Moves by mremap(2) are reported.
    EVENT_REMAP = 2, "4.11";
    /// Pages given up by madvise(2) are reported.
    EVENT_REMOVE = 3, "4.11";
    /// Ranges of hugetlbfs can be registered.
    MISSING_HUGETLBFS = 4, "4.11";
    /// Ranges of shared memory can be registered.
    MISSING_SHMEM = 5, "4.11";
    /// Unmapping is reported.
    EVENT_UNMAP = 6, "4.11";
    /// A fault raises SIGBUS in its thread instead of a message.
    SIGBUS = 7, "4.14";
    /// Messages carry the id of the faulting thread.
    THREAD_ID = 8, "4.14";
    /// Minor faults on hugetlbfs can be reported.
    MINOR_HUGETLBFS = 9, "5.13";
    /// Minor faults on shared memory can be reported.
    MINOR_SHMEM = 10, "5.14";
    /// Messages carry the exact address, not the start of its page.
    EXACT_ADDRESS = 11, "5.18";
    /// Shared memory and hugetlbfs can be write-protected.
    WP_HUGETLBFS_SHMEM = 12, "5.19";
    /// Pages that are not there yet can be write-protected.
    WP_UNPOPULATED = 13, "6.4";
    /// Pages can be made to raise SIGBUS.
    POISON = 14, "6.6";
    /// The kernel lifts write protection by itself and remembers the write.
    WP_ASYNC = 15, "6.7";
    /// Pages can be moved without copying.
    MOVE = 16, "6.8";
}

flag_set! {
    /// A set of userfaultfd ioctls, by their kernel names without `UFFDIO_`.
    Ioctls;
    /// Registers a range.
    REGISTER = 0x00, "4.3";
    /// Ends a registration.
    UNREGISTER = 0x01, "4.3";
    /// Wakes the threads that wait in a range.
    WAKE = 0x02, "4.3";
    /// Installs copied pages.
    COPY = 0x03, "4.3";
    /// Installs zero pages.
    ZEROPAGE = 0x04, "4.3";
    /// Moves pages in.
    MOVE = 0x05, "6.8";
    /// Sets and lifts write protection.
    WRITEPROTECT = 0x06, "5.7";
    /// Maps pages of the page cache.
    CONTINUE = 0x07, "5.13";
    /// Makes pages raise SIGBUS.
    POISON = 0x08, "6.6";
    /// The handshake.
    API = 0x3f, "4.3";
}

// The header's numbers, one by one: a swapped pair would otherwise show as a feature that never works.
const _: () = {
    assert!(Features::ALL.len() == 17);
    assert!(Features::PAGEFAULT_FLAG_WP.0 == 0x1);
    assert!(Features::EVENT_FORK.0 == 0x2);
    assert!(Features::EVENT_REMAP.0 == 0x4);
    assert!(Features::EVENT_REMOVE.0 == 0x8);
    assert!(Features::MISSING_HUGETLBFS.0 == 0x10);
    assert!(Features::MISSING_SHMEM.0 == 0x20);
    assert!(Features::EVENT_UNMAP.0 == 0x40);
    assert!(Features::SIGBUS.0 == 0x80);
    assert!(Features::THREAD_ID.0 == 0x100);
    assert!(Features::MINOR_HUGETLBFS.0 == 0x200);
    assert!(Features::MINOR_SHMEM.0 == 0x400);
    assert!(Features::EXACT_ADDRESS.0 == 0x800);
    assert!(Features::WP_HUGETLBFS_SHMEM.0 == 0x1000);
    assert!(Features::WP_UNPOPULATED.0 == 0x2000);
    assert!(Features::POISON.0 == 0x4000);
    assert!(Features::WP_ASYNC.0 == 0x8000);
    assert!(Features::MOVE.0 == 0x1_0000);

    assert!(Ioctls::ALL.len() == 10);
    assert!(Ioctls::REGISTER.0 == 0x1);
    assert!(Ioctls::UNREGISTER.0 == 0x2);
    assert!(Ioctls::WAKE.0 == 0x4);
    assert!(Ioctls::COPY.0 == 0x8);
    assert!(Ioctls::ZEROPAGE.0 == 0x10);
    assert!(Ioctls::MOVE.0 == 0x20);
    assert!(Ioctls::WRITEPROTECT.0 == 0x40);
    assert!(Ioctls::CONTINUE.0 == 0x80);
    assert!(Ioctls::POISON.0 == 0x100);
    assert!(Ioctls::API.0 == 0x8000_0000_0000_0000);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seventeen_features_are_the_seventeen_lowest_bits() {
        let all = Features::ALL.iter().fold(Features::empty(), |set, known| set | known.flag);
        assert_eq!(all.bits(), 0x1_ffff);
        assert_eq!(Features::ALL[14].name, "POISON");
        assert_eq!(Features::ALL[14].since, "6.6");
    }

    #[test]
    fn sets_print_kernel_names_and_keep_unknown_bits() {
        let set = Features::POISON | Features::EVENT_UNMAP | Features::from_bits(1 << 40);
        assert_eq!(format!("{set:?}"), "EVENT_UNMAP | POISON | 0x10000000000");
        assert_eq!(set.names().collect::<Vec<_>>(), ["EVENT_UNMAP", "POISON"]);
        assert_eq!(set.bits(), 1 << 14 | 1 << 6 | 1 << 40);
        assert_eq!(Features::empty().to_string(), "(none)");
        assert_eq!(Features::from_bits(1 << 40).to_string(), "0x10000000000");
    }

    #[test]
    fn set_arithmetic_is_that_of_sets() {
        let both = Ioctls::COPY.union(Ioctls::WAKE);
        assert!(both.contains(Ioctls::COPY) && both.contains(Ioctls::empty()));
        assert!(!both.contains(Ioctls::COPY | Ioctls::POISON));
        assert_eq!(both.difference(Ioctls::WAKE | Ioctls::MOVE), Ioctls::COPY);
        assert!(both.difference(both).is_empty());
    }
}
