//! The areas of a child as a file: an answer of any length in one message.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::process::new_memfd;
use crate::space::AreaRecord;
use crate::space::mmap_vec::MmapVec;
use crate::{Error, Result};

/// The most that is read: of more areas than a process can have mappings, unless vm.max_map_count was raised twentyfold.
const RECORDS_BYTES_MAX: u64 = 64 << 20;

/// Writes records into a memfd: the answer to a child that forks, of any length, in one message.
pub(crate) fn write_records(records: &[AreaRecord]) -> Result<OwnedFd> {
    let memfd = new_memfd(c"kiomap-areas")?;
    let file = File::from(memfd);
    let mut bytes = Vec::with_capacity(size_of_val(records));
    for word in records.iter().flat_map(|record| record.to_words()) {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    file.write_all_at(&bytes, 0).map_err(Error::io("writing the areas of a child"))?;
    Ok(file.into())
}

/// Reads what [`write_records`] wrote. An unrelated client has it from whoever serves it.
///
/// # Errors
///
/// Those of reading, `EOVERFLOW` for more than [`RECORDS_BYTES_MAX`], and `EPROTO` for areas that can't be.
pub(crate) fn read_records(memfd: OwnedFd) -> Result<MmapVec<AreaRecord>> {
    let failed = "reading the areas of a child";
    let file = File::from(memfd);
    let len = file.metadata().map_err(Error::io(failed))?.len();
    if len > RECORDS_BYTES_MAX {
        return Err(Error::sys(failed)(Errno::EOVERFLOW));
    }
    let mut bytes = Vec::new();
    // No more than that, whatever is written meanwhile.
    file.take(len).read_to_end(&mut bytes).map_err(Error::io(failed))?;
    let mut records = MmapVec::new();
    for chunk in bytes.chunks_exact(AreaRecord::BYTES) {
        let mut words = chunk.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_ne_bytes));
        let record = AreaRecord::from_words(std::array::from_fn(|_| words.next().unwrap_or(0)));
        if record.start.checked_add(record.len).is_none() {
            return Err(Error::sys(failed)(Errno::EPROTO));
        }
        records.try_push(record).map_err(|(_, errno)| Error::sys("mmap for the areas of a child")(errno))?;
    }
    Ok(records)
}
