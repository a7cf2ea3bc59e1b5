//! A tiny HTTP server of one object, which does as it is told, bad things above all.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What is done to a ranged GET.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manners {
    /// The range, as asked for.
    Honest,
    /// A status, and no bytes.
    Status(u16),
    /// Nothing, while the connection stays open.
    Stall,
    /// The head and half of the bytes, and nothing more while the connection stays open.
    StallWithin,
    /// The head and half of the bytes, and the end of the connection.
    CloseWithin,
    /// No word of HTTP.
    Garbage,
    /// Another range than asked for, and its bytes.
    OtherRange,
    /// The range that was asked for, and fewer bytes than that, with their true number as length.
    Short,
    /// The range that was asked for, and more bytes than that.
    Long,
    /// All of the object (200), whatever was asked for.
    Whole,
    /// Another object of the same length, with its own etag.
    Other,
    /// The other object, by the name of the first: no etag.
    Nameless,
    /// A size of the whole that is not what was said when it was opened.
    OtherSize,
}

/// The header lines by which a server tells its object from another, and what they are for the other.
pub(crate) const STRONG: [&str; 2] = ["ETag: \"one\"\r\n", "ETag: \"two\"\r\n"];
/// The same by an etag that promises less.
pub(crate) const WEAK: [&str; 2] = ["ETag: W/\"one\"\r\n", "ETag: W/\"two\"\r\n"];
/// The same by a time only.
pub(crate) const TIMES: [&str; 2] =
    ["Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n", "Last-Modified: Sun, 06 Nov 1994 08:49:38 GMT\r\n"];
/// Not at all.
pub(crate) const NOTHING: [&str; 2] = [""; 2];

/// A server on a port of its own.
pub(crate) struct Web {
    pub(crate) address: SocketAddr,
    /// The manners of the GETs to come: the first of the next one; the last stays.
    manners: Arc<Mutex<Vec<Manners>>>,
    pub(crate) gets: Arc<AtomicU64>,
}

impl Web {
    /// Serves `bytes` to whoever asks, honestly for now, with an etag.
    pub(crate) fn serve(bytes: Vec<u8>) -> Web {
        Web::serve_told_by(STRONG, bytes)
    }

    /// Serves `bytes`, told from another object by header lines.
    pub(crate) fn serve_told_by(names: [&'static str; 2], bytes: Vec<u8>) -> Web {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let web = Web {
            address: listener.local_addr().unwrap(),
            manners: Arc::new(Mutex::new(vec![Manners::Honest])),
            gets: Arc::default(),
        };
        let (manners, gets, bytes) = (Arc::clone(&web.manners), Arc::clone(&web.gets), Arc::new(bytes));
        // Ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (manners, gets, bytes) = (Arc::clone(&manners), Arc::clone(&gets), Arc::clone(&bytes));
                // Whoever hangs up meanwhile is not missed.
                std::thread::spawn(move || stream.and_then(|stream| answer(stream, names, &bytes, &manners, &gets)));
            }
        });
        web
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/object", self.address)
    }

    /// Sets the manners of the next GETs; the last ones stay.
    pub(crate) fn behave(&self, manners: &[Manners]) {
        *self.manners.lock().unwrap() = manners.to_vec();
    }
}

/// Answers one request, and closes.
fn answer(
    mut stream: TcpStream,
    [name, other_name]: [&str; 2],
    bytes: &[u8],
    manners: &Mutex<Vec<Manners>>,
    gets: &AtomicU64,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let mut range = 0..bytes.len();
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some((start, end)) = line.strip_prefix("range: bytes=").and_then(|range| range.split_once('-')) {
            range = start.parse().unwrap()..end.parse::<usize>().unwrap() + 1;
        }
    }
    let head = |status: &str, len: usize, name: &str, more: &str| {
        format!("HTTP/1.1 {status}\r\nContent-Length: {len}\r\n{name}{more}Connection: close\r\n\r\n")
    };
    let content_range = |range: &Range<usize>, size: usize| {
        format!("Content-Range: bytes {}-{}/{size}\r\n", range.start, range.end - 1)
    };
    if request.starts_with("HEAD") {
        return stream.write_all(head("200 OK", bytes.len(), name, "").as_bytes());
    }
    gets.fetch_add(1, Ordering::SeqCst);
    let manners = {
        let mut manners = manners.lock().unwrap();
        if manners.len() > 1 { manners.remove(0) } else { manners[0] }
    };
    let partial = "206 Partial Content";
    let (len, part, told) = (range.len(), &bytes[range.clone()], content_range(&range, bytes.len()));
    let mut respond = |head: String, body: &[u8]| stream.write_all(&[head.as_bytes(), body].concat());
    // Longer than any deadline of a source here, and shorter than a test's.
    let stall = || std::thread::sleep(Duration::from_secs(20));
    match manners {
        Manners::Honest => respond(head(partial, len, name, &told), part),
        Manners::Status(status) => respond(head(&format!("{status} Told So"), 0, name, ""), &[]),
        Manners::Stall => {
            stall();
            Ok(())
        }
        Manners::StallWithin => {
            respond(head(partial, len, name, &told), &part[..len / 2])?;
            stall();
            Ok(())
        }
        Manners::CloseWithin => respond(head(partial, len, name, &told), &part[..len / 2]),
        Manners::Garbage => respond("\u{0}\u{1}\u{2} what?\r\n\r\n".into(), &[]),
        Manners::OtherRange => {
            let start = (range.start + 4096) % (bytes.len() - len + 1);
            let other = start..start + len;
            respond(head(partial, len, name, &content_range(&other, bytes.len())), &bytes[other])
        }
        Manners::Short => respond(head(partial, len - 1, name, &told), &part[1..]),
        Manners::Long => respond(head(partial, len + 1, name, &told), &[&[0xee], part].concat()),
        Manners::Whole => respond(head("200 OK", bytes.len(), name, ""), bytes),
        Manners::Other | Manners::Nameless => {
            let other: Vec<u8> = part.iter().map(|byte| !byte).collect();
            let name = if manners == Manners::Other { other_name } else { "" };
            respond(head(partial, len, name, &told), &other)
        }
        Manners::OtherSize => respond(head(partial, len, name, &content_range(&range, bytes.len() + 1)), part),
    }
}
