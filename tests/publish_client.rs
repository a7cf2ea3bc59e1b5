//! What a client of a published vmap does to its memory: what nobody told the engine of, and what the engine tells wrongly.

mod support;
#[path = "publish/raw.rs"]
mod wire;

use kiomap::{AttachOptions, Client, ClientOptions, PublishOptions, page_size};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use support::scene::child;
use support::{alone, engine_builder, mark, pages, raw, reap_ok, touch};
use wire::reply;

/// Where a client attaches: nothing lies there, nor behind.
const ADDR: usize = 0x6000_0000_0000;

/// A mapping that grew in place, and lost the pages that the engine knew, outlives region and client: what is missing there is
/// SIGBUS, and never zeros for everybody.
#[test]
fn what_a_client_leaves_mapped_unseen_never_becomes_zeros() {
    alone("what_a_client_leaves_mapped_unseen_never_becomes_zeros", || {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(16)).unwrap();
        let _published = vmap.publish(&socket, PublishOptions::new()).unwrap();
        // Not forked from here as far as the engine knows: it connects anew.
        reap_ok(child(|| {
            let client = Client::attach(&socket, &ClientOptions::new()).unwrap();
            let half = 8 * page_size();
            let region = client.vmap().attach(&AttachOptions::new().len_bytes(half).at(ADDR)).unwrap();
            // SAFETY: the range is the region's, and what lies behind is free; nothing refers to it.
            unsafe {
                let grown = libc::mremap(ADDR as *mut libc::c_void, half, 2 * half, 0);
                assert_eq!(grown as usize, ADDR, "{}", std::io::Error::last_os_error());
                assert_eq!(libc::munmap(ADDR as *mut libc::c_void, half), 0);
            }
            drop(region);
            drop(client);
            for page in 8..16 {
                let addr = (ADDR + page * page_size()) as *mut u8;
                assert_ne!(touch::read(addr), Ok(0), "page {page}");
            }
        }));
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for page in 0..16 {
            let addr = region.as_ptr().wrapping_add(page * page_size());
            assert_eq!(touch::read(addr), Ok(mark(page as u64)), "page {page}");
        }
    });
}

/// A server that names other memory than the vmap's as a region's, or what is no range at all, has none of it unmapped.
#[test]
fn a_client_unmaps_nothing_but_memory_of_the_vmap() {
    alone("a_client_unmaps_nothing_but_memory_of_the_vmap", || {
        let folder = tempfile::tempdir().unwrap();
        // What else is mapped, and what a client needs to be like.
        let other = raw::populated(0, 4);
        let features = engine_builder().build().unwrap().features();
        if !features.contains(kiomap::Features::POISON) {
            skip!("a server that is made by hand has no masks");
        }
        let page = page_size() as u64;
        let at = other as u64;
        for (n, (start, end)) in
            [(at, at + 4 * page), (at + page, at + 2 * page), (at + page, at), (at + 1, at + page), (0, u64::MAX)]
                .into_iter()
                .enumerate()
        {
            let path = folder.path().join(n.to_string());
            let sealed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
            let memory = memfd_create("server", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
            nix::unistd::ftruncate(&memory, 4 * page as i64).unwrap();
            fcntl(&memory, FcntlArg::F_ADD_SEALS(sealed)).unwrap();
            // One piece, and places for seven more.
            let pieces: Vec<u64> = [vec![reply::PIECES.into(), start, end], vec![0; 14], vec![1]].concat();
            wire::impostor(
                &path,
                vec![
                    (wire::frame(&[0, 1, 4, page, 0, 0, 0, 0, 0, features.bits(), 0]), vec![memory]),
                    (wire::frame(&[1]), vec![support::pidfd(nix::unistd::Pid::this())]),
                    (wire::frame(&[reply::DONE.into()]), vec![]),
                    (wire::frame(&[reply::ATTACHED.into(), 1]), vec![]),
                    (wire::frame(&pieces), vec![]),
                ],
                false,
            );
            let client = Client::attach(&path, &ClientOptions::new()).unwrap();
            let region = client.vmap().attach(&AttachOptions::new()).unwrap();
            let addr = region.as_ptr() as usize;
            drop(region);
            for page in 0..4 {
                assert_eq!(touch::read((other + page * page_size()) as *const u8), Ok(0), "{start:#x}..{end:#x}");
            }
            // Nobody has said what is left of the region: it stays.
            assert_eq!(raw::mappings(addr, addr + page_size()), 1);
            // It would ask whether it may go, and nobody answers.
            std::mem::forget(client);
        }
    });
}
