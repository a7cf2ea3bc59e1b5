//! Page lists made of parts, and what their pages should hold.

use std::fs::File;
use std::io::{Error, Result, Write};
use std::sync::Arc;

use kiomap::{Kiobuf, PageSource, page_size};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::script::Part;
use crate::sheet::data_page;

/// What a page of a list gives: nothing, or bytes.
pub(crate) type Given = Option<Vec<u8>>;

struct Pages {
    vmap: usize,
    first: u64,
    bad: Option<usize>,
}

impl PageSource for Pages {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        let first = offset_bytes as usize / page_size();
        for (page, bytes) in (first..).zip(buf.chunks_mut(page_size())) {
            if self.bad == Some(page) {
                return Err(Error::from_raw_os_error(libc::EIO));
            }
            // Some are slower than others.
            for _ in 0..crate::script::stamp(self.vmap as u64, page as u64) % 40 {
                std::thread::yield_now();
            }
            bytes.copy_from_slice(&data_page(self.vmap, self.first + page as u64)[..bytes.len()]);
        }
        Ok(())
    }
}

/// Bytes within a vector.
struct Within(Vec<u8>, std::ops::Range<usize>);

impl AsRef<[u8]> for Within {
    fn as_ref(&self) -> &[u8] {
        &self.0[self.1.clone()]
    }
}

/// The end of a memfd in which nothing is, after a page of something else.
fn holes_of_a_memfd(pages: u64) -> Kiobuf {
    let page = page_size() as u64;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create(c"chaos", flags).unwrap());
    file.write_all(&vec![0xee; page_size()]).unwrap();
    file.set_len((1 + pages) * page).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
    let mut list = Kiobuf::new();
    list.map_memfd(&file, page..(1 + pages) * page).unwrap();
    list
}

/// Builds the list of `parts`, which begins with page `first` of a vmap.
pub(crate) fn build(vmap: usize, mut first: u64, parts: &[Part]) -> (Kiobuf, Vec<Given>) {
    let mut whole = Kiobuf::new();
    let mut given = Vec::new();
    for &part in parts {
        let pages = part.pages();
        let (mut list, page) = (Kiobuf::new(), page_size());
        let mut data: Vec<u8> = (0..pages as u64).flat_map(|n| data_page(vmap, first + n)).collect();
        let mut bad = None;
        match part {
            Part::Bytes { slack, .. } => {
                let len = data.len() - slack.min(page - 1);
                list.map_bytes(data[..len].to_vec()).unwrap();
                data[len..].fill(0);
            }
            Part::Slice { head, .. } => {
                let head = head.min(page - 1);
                let mut bytes = vec![0xee; data.len() + page];
                let start = bytes.as_ptr().align_offset(page);
                bytes[start..start + data.len()].copy_from_slice(&data);
                let range = start + head..start + data.len();
                list.map_slice(Within(bytes, range)).unwrap();
                data[..head].fill(0);
            }
            Part::File { slack, .. } => {
                let len = data.len() - slack.min(page - 1);
                let fd = memfd_create(c"chaos", MFdFlags::MFD_CLOEXEC).unwrap();
                let mut file = File::from(fd);
                // Begins in the middle of a page of the file.
                file.write_all(&[0xee; 100]).unwrap();
                file.write_all(&data[..len]).unwrap();
                list.map_file(&file, 100..100 + len as u64).unwrap();
                data[len..].fill(0);
            }
            Part::Source { bad: which, .. } => {
                bad = which;
                list.map_source(Arc::new(Pages { vmap, first, bad }), data.len() as u64).unwrap();
            }
            Part::Zero { pages } => {
                match parts {
                    // Shown itself, if it is all of a list that does not grow.
                    [_] => list = holes_of_a_memfd(pages as u64),
                    _ => list.map_zero(pages as u64).unwrap(),
                }
                data.fill(0);
            }
            Part::Hole { pages } => list.map_hole(pages as u64).unwrap(),
        }
        let hole = matches!(part, Part::Hole { .. });
        given.extend(data.chunks(page).enumerate().map(|(n, bytes)| (!hole && bad != Some(n)).then(|| bytes.to_vec())));
        whole.expand(&list).unwrap();
        first += pages as u64;
    }
    (whole, given)
}
