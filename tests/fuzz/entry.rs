//! What is done with any bytes, by the fuzzer and by the tests of its corpus. Each returns whether the bytes were accepted, and
//! panics where something is not as it must be.

use kiomap::firecracker::{Limits, check_against, parse};

/// A message of a VM monitor: what is accepted is sound, whatever it was.
pub(crate) fn handshake(bytes: &[u8]) -> bool {
    let limits = Limits::new();
    let regions = match parse(bytes, &limits) {
        Ok(regions) => regions,
        Err(fault) => {
            assert!(fault.to_string().len() < 2000, "{fault}");
            assert_ne!(fault.errno() as i32, 0);
            return false;
        }
    };
    assert!((1..=256).contains(&regions.len()));
    let mut end_in_file = 0;
    for (n, region) in regions.iter().enumerate() {
        let page = region.page_size.bytes();
        let addrs = region.addrs();
        assert!(addrs.start < addrs.end && addrs.len() == region.size_bytes);
        assert!(addrs.start.is_multiple_of(page) && addrs.end.is_multiple_of(page));
        assert!(region.offset_bytes.is_multiple_of(page as u64));
        assert_eq!(region.pgoff() * kiomap::page_size() as u64, region.offset_bytes);
        end_in_file = end_in_file.max(region.offset_bytes + region.size_bytes as u64);
        for other in &regions[..n] {
            assert!(other.addrs().end <= addrs.start || addrs.end <= other.addrs().start);
        }
    }
    assert!(check_against(&regions, end_in_file).is_ok());
    assert!(check_against(&regions, end_in_file - 1).is_err());
    // White space says nothing.
    let spaced: Vec<u8> = [b"\n ", bytes, b"\t"].concat();
    if spaced.len() <= 64 << 10 {
        assert_eq!(parse(&spaced, &limits).as_ref(), Ok(&regions));
    }
    true
}
