//! The test support's own touches: they must tell bytes, SIGBUS and SIGSEGV apart before other tests rely on them.

mod support;

use kiomap::{AttachOptions, page_size};
use support::{alone, engine_builder, mark, pages, touch};

/// A touch reads right bytes inside the list, is SIGBUS past its end, and SIGSEGV where a write is not allowed.
#[test]
fn a_touch_tells_bytes_sigbus_and_sigsegv_apart() {
    alone("a_touch_tells_bytes_sigbus_and_sigsegv_apart", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(2)).unwrap();
        let region = vmap.attach(&AttachOptions::new().len_bytes(3 * page_size()).read_only()).unwrap();
        let at = |page: usize| region.as_ptr().wrapping_add(page * page_size() + 5);
        for _ in 0..3 {
            assert_eq!(touch::read(at(0)), Ok(mark(0)));
            assert_eq!(touch::read(at(1)), Ok(mark(1)));
            assert!(touch::read(at(2)).unwrap_err().is_sigbus_at(at(2) as usize));
            assert!(touch::write(at(0), 1).unwrap_err().is_sigsegv());
        }
    });
}
