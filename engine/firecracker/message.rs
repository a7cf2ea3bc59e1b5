//! The message itself: JSON into regions, and what must hold of them. Pure.

use std::fmt;
use std::io::Read;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use super::{GuestRegion, HandshakeFault, Limits};
use crate::PageSize;

/// What older versions mean when they name no page size.
const PAGE_BYTES: u64 = 4096;
/// The longest that a parser's words about a message get: it may quote the message.
const WHY_CHARS: usize = 200;

/// A region as it is sent. Fields that are not known here are passed over.
#[derive(serde::Deserialize)]
struct Record {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// Holds bytes, whatever its name says; deprecated, and all that older versions have.
    page_size_kib: Option<u64>,
}

/// A [`Record`] that is an object: derived code takes an array of its fields for one, too.
struct Object(Record);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Object, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that describes a region")
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Object, A::Error> {
                Record::deserialize(MapAccessDeserializer::new(fields)).map(Object)
            }
        }
        from.deserialize_map(Fields)
    }
}

/// Parses a whole message: one array, and around it white space at the most.
///
/// # Errors
///
/// [`HandshakeFault`] of every kind but those of sockets, descriptors and files.
pub fn parse(message: &[u8], limits: &Limits) -> Result<Vec<GuestRegion>, HandshakeFault> {
    if message.len() > limits.message_bytes {
        return Err(HandshakeFault::TooLong { limit: limits.message_bytes });
    }
    let mut rest = message;
    let regions = parse_front(&mut rest, limits).map_err(|unreadable| match unreadable {
        Unreadable::Fault(fault) => fault,
        Unreadable::Json(error) => not_one(&error),
    })?;
    if is_blank(rest) { Ok(regions) } else { Err(HandshakeFault::Trailing) }
}

/// Why no regions were read.
pub(super) enum Unreadable {
    Fault(HandshakeFault),
    /// Of the parser: also when what is read from failed or ended.
    Json(serde_json::Error),
}

/// Reads a message up to the bracket that ends it, and not a byte further.
pub(super) fn parse_front(from: &mut impl Read, limits: &Limits) -> Result<Vec<GuestRegion>, Unreadable> {
    let mut json = serde_json::Deserializer::from_reader(from);
    let records = Vec::<Object>::deserialize(&mut json).map_err(Unreadable::Json)?;
    regions_of(&records, limits).map_err(Unreadable::Fault)
}

/// Says what the parser has to say.
pub(super) fn not_one(error: &serde_json::Error) -> HandshakeFault {
    HandshakeFault::NotOne { why: error.to_string().chars().take(WHY_CHARS).collect() }
}

/// Whether bytes say nothing, to a parser of JSON.
pub(super) fn is_blank(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'))
}

fn regions_of(records: &[Object], limits: &Limits) -> Result<Vec<GuestRegion>, HandshakeFault> {
    match records.len() {
        0 => return Err(HandshakeFault::NoRegions),
        found if found > limits.regions => {
            return Err(HandshakeFault::TooManyRegions { found, limit: limits.regions });
        }
        _ => {}
    }
    let regions: Vec<_> =
        records.iter().enumerate().map(|(n, Object(record))| region_of(n, record)).collect::<Result<_, _>>()?;
    let mut by_addr: Vec<usize> = (0..regions.len()).collect();
    by_addr.sort_by_key(|&n| regions[n].base_host_virt_addr);
    for pair in by_addr.windows(2) {
        if regions[pair[0]].addrs().end > regions[pair[1]].base_host_virt_addr {
            return Err(HandshakeFault::Overlap { region: pair[0], other: pair[1] });
        }
    }
    Ok(regions)
}

fn region_of(region: usize, record: &Record) -> Result<GuestRegion, HandshakeFault> {
    let &Record { base_host_virt_addr, size, offset, page_size, page_size_kib } = record;
    if let (Some(page_size), Some(page_size_kib)) = (page_size, page_size_kib)
        && page_size != page_size_kib
    {
        return Err(HandshakeFault::TwoPageSizes { region, page_size, page_size_kib });
    }
    let bytes = page_size.or(page_size_kib).unwrap_or(PAGE_BYTES);
    let known = [PageSize::Base, PageSize::Huge2M, PageSize::Huge1G].into_iter();
    let Some(page_size) = known.into_iter().find(|size| size.bytes() as u64 == bytes) else {
        return Err(HandshakeFault::PageSize { region, bytes });
    };
    if size == 0 {
        return Err(HandshakeFault::Empty { region });
    }
    for (field, value) in [("base_host_virt_addr", base_host_virt_addr), ("size", size), ("offset", offset)] {
        if !value.is_multiple_of(bytes) {
            return Err(HandshakeFault::Misaligned { region, field, value, multiple: bytes });
        }
    }
    // Beyond these no kernel has addresses, and no file bytes.
    const END: u64 = i64::MAX as u64;
    for (field, base) in [("base_host_virt_addr", base_host_virt_addr), ("offset", offset)] {
        if base.checked_add(size).is_none_or(|end| end > END) {
            return Err(HandshakeFault::Overflow { region, field, base, size });
        }
    }
    Ok(GuestRegion {
        base_host_virt_addr: base_host_virt_addr as usize,
        size_bytes: size as usize,
        offset_bytes: offset,
        page_size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(message: &str) -> Result<Vec<GuestRegion>, HandshakeFault> {
        parse(message.as_bytes(), &Limits::new())
    }

    /// The region of a message with one, made of these fields.
    fn region(fields: &str) -> Result<GuestRegion, HandshakeFault> {
        parsed(&format!("[{{{fields}}}]")).map(|regions| regions[0])
    }

    const PLACE: &str = r#""base_host_virt_addr":140000000004096,"size":8192,"offset":4096"#;

    #[test]
    fn a_message_of_each_version_is_understood() {
        let whole = r#"[
            {"base_host_virt_addr":4194304,"size":2097152,"offset":0,"page_size":4096,"page_size_kib":4096},
            {"base_host_virt_addr":8388608,"size":4194304,"offset":2097152,"page_size":2097152,"page_size_kib":2097152}
        ] "#;
        let regions = parsed(whole).unwrap();
        let wanted = [(4_194_304, 2_097_152, 0, PageSize::Base), (8_388_608, 4_194_304, 2_097_152, PageSize::Huge2M)];
        let found: Vec<_> =
            regions.iter().map(|r| (r.base_host_virt_addr, r.size_bytes, r.offset_bytes, r.page_size)).collect();
        assert_eq!(found, wanted);
        assert_eq!((regions[1].addrs(), regions[1].pgoff()), (8_388_608..12_582_912, 512));

        let of_bytes = |fields: &str| region(&format!("{PLACE}{fields}")).map(|region| region.page_size);
        for fields in ["", r#","page_size":4096"#, r#","page_size_kib":4096"#, r#","page_size":null"#] {
            assert_eq!(of_bytes(fields), Ok(PageSize::Base), "{fields}");
        }
        // What later versions add is their own affair, however it looks.
        let later = r#","page_size":4096,"later":{"deep":[[1.5e300,"]"],{}]},"page_size_bytes":"4 KiB""#;
        assert_eq!(of_bytes(later), Ok(PageSize::Base));
        let huge = r#""base_host_virt_addr":1073741824,"size":2147483648,"offset":0,"page_size_kib":1073741824"#;
        assert_eq!(region(huge).unwrap().page_size, PageSize::Huge1G);
    }

    #[test]
    fn what_is_no_array_of_regions_is_refused_in_the_parsers_words() {
        let deep = "[".repeat(10_000);
        let unknown = format!(r#"[{{{PLACE},"later":{}}}]"#, "[".repeat(10_000));
        let region = format!("{{{PLACE}}}");
        for message in [
            "",
            " ",
            "{",
            "[",
            "null",
            "7",
            "\"[]\"",
            "regions",
            "[7]",
            "[null]",
            "[[4096,4096,0,4096,4096]]",
            &deep,
            &unknown,
            &region,
            &format!("[{region}"),
            &format!("[{region},]"),
            &format!("[{region}{region}]"),
            &format!("[{{{PLACE},\"offset\":0}}]"),
            &format!("[{{{PLACE},\"page_size\":4096.0}}]"),
            &format!("[{{{PLACE},\"page_size\":-4096}}]"),
            &format!("[{{{PLACE},\"page_size\":\"4096\"}}]"),
            &format!("[{{{PLACE},\"page_size\":18446744073709551616}}]"),
            &format!("[{{{PLACE},}}]"),
            r#"[{"size":4096,"offset":0}]"#,
            r#"[{"base_host_virt_addr":4096,"size":4096}]"#,
        ] {
            let fault = parsed(message).unwrap_err();
            assert!(matches!(fault, HandshakeFault::NotOne { .. }), "{message:.60}: {fault}");
            assert_eq!(fault.errno(), nix::errno::Errno::EBADMSG);
        }
        let HandshakeFault::NotOne { why } = parsed(&format!("[\"{}\"]", "x".repeat(60_000))).unwrap_err() else {
            panic!()
        };
        assert!(why.len() <= WHY_CHARS, "{}", why.len());
        // Bytes that are no text.
        assert!(parse(b"[{\"\xff\":1}]", &Limits::new()).is_err());
    }

    #[test]
    fn only_white_space_follows() {
        let region = format!("{{{PLACE}}}");
        assert_eq!(parsed(&format!(" [{region}]\r\n\t ")).unwrap().len(), 1);
        for behind in ["x", "[]", "\0", ",", "]"] {
            assert_eq!(parsed(&format!("[{region}]{behind}")), Err(HandshakeFault::Trailing), "{behind}");
        }
    }

    #[test]
    fn regions_that_can_not_be_are_refused() {
        let fields = |base: u64, size: u64, offset: u64, page: u64| {
            region(&format!(r#""base_host_virt_addr":{base},"size":{size},"offset":{offset},"page_size":{page}"#))
        };
        let huge = 2 << 20;
        for bytes in [0, 1, 4, 4095, 8192, 1 << 40, u64::MAX] {
            assert_eq!(fields(4096, 4096, 0, bytes), Err(HandshakeFault::PageSize { region: 0, bytes }));
        }
        assert_eq!(fields(4096, 0, 0, 4096), Err(HandshakeFault::Empty { region: 0 }));
        let misaligned = |field, value, multiple| Err(HandshakeFault::Misaligned { region: 0, field, value, multiple });
        assert_eq!(fields(4097, 4096, 0, 4096), misaligned("base_host_virt_addr", 4097, 4096));
        assert_eq!(fields(4096, 4095, 0, 4096), misaligned("size", 4095, 4096));
        assert_eq!(fields(4096, 4096, 1, 4096), misaligned("offset", 1, 4096));
        assert_eq!(fields(4096, huge, 0, huge), misaligned("base_host_virt_addr", 4096, huge));
        assert_eq!(fields(huge, 4096, 0, huge), misaligned("size", 4096, huge));
        assert_eq!(fields(huge, huge, 4096, huge), misaligned("offset", 4096, huge));
        let last = !4095;
        for (base, size, offset, field) in [
            (last, 4096, 0, "base_host_virt_addr"),
            (4096, last, 0, "base_host_virt_addr"),
            (1 << 63, 4096, 0, "base_host_virt_addr"),
            (4096, 4096, last, "offset"),
            (4096, 8192, (1 << 63) - 4096, "offset"),
        ] {
            let fault = fields(base, size, offset, 4096).unwrap_err();
            assert!(
                matches!(fault, HandshakeFault::Overflow { field: found, .. } if found == field),
                "{base:#x} {size:#x} {offset:#x}: {fault}"
            );
        }
        let two = region(&format!(r#"{PLACE},"page_size":4096,"page_size_kib":4"#)).unwrap_err();
        assert_eq!(two, HandshakeFault::TwoPageSizes { region: 0, page_size: 4096, page_size_kib: 4 });
    }

    #[test]
    fn regions_are_few_and_apart() {
        let at = |base: u64, size: u64| format!(r#"{{"base_host_virt_addr":{base},"size":{size},"offset":0}}"#);
        let of = |regions: &[String]| parsed(&format!("[{}]", regions.join(",")));
        assert_eq!(parsed("[]"), Err(HandshakeFault::NoRegions));
        assert_eq!(of(&[at(8192, 4096), at(4096, 4096)]).unwrap().len(), 2);
        let overlap = |region, other| Err(HandshakeFault::Overlap { region, other });
        assert_eq!(of(&[at(8192, 4096), at(4096, 8192)]), overlap(1, 0));
        assert_eq!(of(&[at(4096, 4096), at(40960, 4096), at(4096, 4096)]), overlap(0, 2));
        assert_eq!(of(&[at(4096, 1 << 30), at(1 << 20, 4096)]), overlap(0, 1));
        let many: Vec<_> = (1..=257).map(|n| at(n * 4096, 4096)).collect();
        assert_eq!(of(&many), Err(HandshakeFault::TooManyRegions { found: 257, limit: 256 }));
        assert_eq!(of(&many[1..]).unwrap().len(), 256);
        assert_eq!(parsed(&" ".repeat(70_000)), Err(HandshakeFault::TooLong { limit: 65_536 }));
    }

    #[test]
    fn a_memory_file_covers_every_region() {
        let regions = parsed(&format!("[{{{PLACE}}}]")).unwrap();
        assert_eq!(crate::firecracker::check_against(&regions, 12_288), Ok(()));
        let beyond = HandshakeFault::BeyondFile { region: 0, end: 12_288, memory_bytes: 12_287 };
        assert_eq!(crate::firecracker::check_against(&regions, 12_287), Err(beyond));
    }
}
