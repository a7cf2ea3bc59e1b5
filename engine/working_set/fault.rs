//! Why a working set is refused.

/// Says why a working set, or the file of one, can't be used ([`Error::WorkingSet`](crate::Error::WorkingSet)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkingSetFault {
    /// The file is something else.
    #[error("the file is no working set")]
    NotOne,
    /// The file is of another version of the library.
    #[error("its version is {found}, and this library knows version {known}: record it again")]
    Version {
        /// The version that it has.
        found: u32,
        /// The version that can be read.
        known: u32,
    },
    /// The file is longer than any working set.
    #[error(
        "the file has {bytes} bytes, more than any working set (at most {limit}): it is damaged, or something else"
    )]
    TooLong {
        /// Its length in bytes.
        bytes: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The checksum does not match: bytes were lost or changed.
    #[error("its checksum does not match: it is damaged or incomplete; record it again")]
    Damaged,
    /// It was recorded where pages have another size.
    #[error("it is of pages of {found} bytes, and here they have {here}: record it again")]
    PageSize {
        /// The size in bytes where it was recorded.
        found: u64,
        /// The size in bytes here.
        here: u64,
    },
    /// It is of a list of another length.
    #[error("it is of a list of {found} pages, and this one has {here}: record it again")]
    OtherLength {
        /// The pages of its list.
        found: u64,
        /// The pages of the list that it was to be used for.
        here: u64,
    },
    /// It is of an image with other contents.
    #[error("it is of another image, or the image was changed: record it again")]
    OtherImage,
}
