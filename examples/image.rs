//! Makes images to page from, checks them, and tells what is in them.
//!
//! ```text
//! cargo run --release --features zstd --example image -- make FILE IMAGE --level 3 --frame 128K
//! cargo run --release --features zstd --example image -- check IMAGE --against FILE
//! cargo run --release --features zstd --example image -- info IMAGE
//! ```
//!
//! A zstd image is in zstd's seekable format: `zstd -d` reads it too. A plain image is the file itself, with holes for its
//! zeros. An image comes to its name when it is whole and on the disk, or not at all.

use std::fs::{File, Permissions};
use std::io::{BufReader, BufWriter, ErrorKind, IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use kiomap::{ExtentKind, Kiobuf, PageSource, ZstdImage, ZstdOptions, page_size};
use sha2::{Digest, Sha256};

/// Bytes that are copied and compared at a time; a run of zeros that begins and ends with such a block becomes a hole.
const BLOCK_BYTES: usize = 64 << 10;

/// Makes images to page from, checks them, and tells what is in them.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes an image of a file
    Make {
        /// The file: a regular file or a block device
        file: PathBuf,
        /// The image, which must not be there yet
        image: PathBuf,
        /// What kind of image
        #[arg(long, value_enum, default_value_t = Format::Zstd)]
        format: Format,
        /// Level of compression, from 1 to 22
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
        level: i32,
        /// Bytes of a frame, which a touch decompresses: a power of two from 4K to 4M
        #[arg(long, default_value = "128K", value_parser = parse_size)]
        frame: usize,
    },
    /// Reads all of an image and checks every checksum
    Check {
        /// The image
        image: PathBuf,
        /// A file that it must hold, byte for byte
        #[arg(long)]
        against: Option<PathBuf>,
        /// What kind of image it is; unless given, zstd if it begins as one
        #[arg(long, value_enum)]
        format: Option<Format>,
    },
    /// Tells what is in an image
    Info {
        /// The image
        image: PathBuf,
        /// Print one JSON object instead of text
        #[arg(long)]
        json: bool,
        /// What kind of image it is; unless given, zstd if it begins as one
        #[arg(long, value_enum)]
        format: Option<Format>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Compressed, in the seekable format of zstd
    Zstd,
    /// The bytes as they are, with holes for zeros
    Plain,
}

fn main() -> ExitCode {
    let outcome = match &Options::parse().command {
        Command::Make { file, image, format, level, frame } => make(file, image, *format, *level, *frame),
        Command::Check { image, against, format } => check(image, *format, against.as_deref()),
        Command::Info { image, json, format } => info(image, *format, *json),
    };
    // Not print!, which panics when nobody listens.
    let told =
        outcome.and_then(|text| std::io::stdout().lock().write_all(text.as_bytes()).context("writing the report"));
    match told {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With its causes, in one line.
            eprintln!("image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn make(file: &Path, image: &Path, format: Format, level: i32, frame: usize) -> Result<String> {
    let (input, len_bytes) = open(file)?;
    let shown = image.display();
    ensure!(!image.try_exists().with_context(|| format!("{shown} can't be examined"))?, "{shown} is there already");
    let folder = match image.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    // In the same folder, so that it can be renamed; removed unless it is.
    let temporary = tempfile::Builder::new()
        .prefix(".image-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .with_context(|| format!("making a file in {}", folder.display()))?;
    let bar = bar(len_bytes)?;
    let made = || format!("making {shown}");
    let report = match format {
        Format::Zstd => {
            let options = ZstdOptions::new().level(level).frame_bytes(frame);
            let write = BufWriter::new(temporary.as_file());
            let made = ZstdImage::make(input, write, &options, |done| bar.set_position(done)).with_context(made)?;
            Report {
                digest: made.contents_sha256,
                len_bytes: made.len_bytes,
                image_bytes: made.image_bytes,
                zero_bytes: made.zero_bytes,
            }
        }
        Format::Plain => make_plain(input, temporary.as_file(), &bar).with_context(made)?,
    };
    bar.finish_and_clear();
    ensure!(report.len_bytes == len_bytes, "{} had {len_bytes} bytes and gave {}", file.display(), report.len_bytes);
    temporary.as_file().sync_all().with_context(|| format!("writing {shown} to the disk"))?;
    temporary.persist_noclobber(image).map_err(|error| error.error).with_context(|| format!("naming {shown}"))?;
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .with_context(|| format!("writing the name {shown} to the disk"))?;
    Ok(format!(
        "image    {shown}\n\
         holds    {} bytes, of which {} are zeros that cost no read\n\
         takes    {} bytes, {:.3} of that\n\
         sha256   {}\n",
        report.len_bytes,
        report.zero_bytes,
        report.image_bytes,
        report.image_bytes as f64 / report.len_bytes as f64,
        hex(&report.digest)
    ))
}

/// What is told of an image that was made.
struct Report {
    digest: [u8; 32],
    len_bytes: u64,
    image_bytes: u64,
    zero_bytes: u64,
}

/// Copies all but the blocks of zeros.
fn make_plain(mut input: File, mut output: &File, bar: &ProgressBar) -> Result<Report> {
    let (mut block, mut digest) = (vec![0; BLOCK_BYTES], Sha256::new());
    let (mut len_bytes, mut zero_bytes) = (0, 0);
    loop {
        let len = read_full(&mut input, &mut block).context("reading the file")?;
        let bytes = &block[..len];
        if bytes.iter().all(|&byte| byte == 0) {
            output.seek(SeekFrom::Current(len as i64))?;
            zero_bytes += len as u64;
        } else {
            output.write_all(bytes).context("writing the image")?;
        }
        digest.update(bytes);
        len_bytes += len as u64;
        bar.set_position(len_bytes);
        if len < block.len() {
            break;
        }
    }
    output.set_len(len_bytes).context("writing the image")?;
    Ok(Report { digest: digest.finalize().into(), len_bytes, image_bytes: len_bytes - zero_bytes, zero_bytes })
}

/// An image that is there.
enum Image {
    Zstd(Arc<ZstdImage>),
    Plain(File, u64),
}

impl Image {
    /// Unless a format is named, what begins as a zstd frame, or as one that zstd skips, is to be a zstd image: one that was cut
    /// off is not taken for a plain one.
    fn open(path: &Path, format: Option<Format>) -> Result<Self> {
        const FRAME: u32 = 0xfd2f_b528;
        const SKIPPABLE: std::ops::RangeInclusive<u32> = 0x184d_2a50..=0x184d_2a5f;
        let (mut file, len_bytes) = open(path)?;
        let mut head = [0; 4];
        read_full(&mut file, &mut head).with_context(|| format!("reading {}", path.display()))?;
        let head = u32::from_le_bytes(head);
        let begins_as_zstd = head == FRAME || SKIPPABLE.contains(&head);
        match format.unwrap_or(if begins_as_zstd { Format::Zstd } else { Format::Plain }) {
            Format::Zstd => {
                let opened = ZstdImage::open(path);
                let image =
                    if format.is_some() { opened? } else { opened.context("if it is plain: --format plain")? };
                Ok(Image::Zstd(Arc::new(image)))
            }
            Format::Plain => {
                file.rewind()?;
                Ok(Image::Plain(file, len_bytes))
            }
        }
    }

    fn len_bytes(&self) -> u64 {
        match self {
            Image::Zstd(image) => image.len_bytes().unwrap_or(0),
            Image::Plain(_, len_bytes) => *len_bytes,
        }
    }

    /// A reader of its contents.
    fn contents(&self) -> Result<Box<dyn Read + '_>> {
        Ok(match self {
            Image::Zstd(image) => Box::new(BufReader::with_capacity(image.granule_bytes(), Contents { image, at: 0 })),
            Image::Plain(file, _) => Box::new(BufReader::with_capacity(BLOCK_BYTES, file)),
        })
    }

    fn list(&self) -> Result<Kiobuf> {
        match self {
            Image::Zstd(image) => Ok(image.list()?),
            Image::Plain(file, _) => {
                let mut list = Kiobuf::new();
                list.map_sparse_file(file)?;
                Ok(list)
            }
        }
    }
}

/// Reads an image from its start to its end.
struct Contents<'a> {
    image: &'a ZstdImage,
    at: u64,
}

impl Read for Contents<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = (self.image.len_bytes().unwrap_or(0) - self.at).min(buf.len() as u64) as usize;
        self.image.read_at(self.at, &mut buf[..len])?;
        self.at += len as u64;
        Ok(len)
    }
}

fn check(path: &Path, format: Option<Format>, against: Option<&Path>) -> Result<String> {
    let (shown, image) = (path.display(), Image::open(path, format)?);
    let bar = bar(image.len_bytes())?;
    let mut text = match &image {
        Image::Zstd(image) => {
            image.verify(|done| bar.set_position(done))?;
            match image.contents_sha256() {
                Some(digest) => {
                    format!("verified: every frame of {shown}, and the SHA-256 of it all, {}\n", hex(&digest))
                }
                None => format!("verified: every frame of {shown} decompresses; it names no SHA-256 of its contents\n"),
            }
        }
        Image::Plain(..) if against.is_none() => {
            bail!("{shown} is a plain image, which has no checksum: name the file that it must hold, --against FILE")
        }
        Image::Plain(..) => String::new(),
    };
    if let Some(file) = against {
        bar.set_position(0);
        compare(&image, file, &bar)?;
        text += &format!("verified: {shown} holds {}, byte for byte\n", file.display());
    }
    bar.finish_and_clear();
    Ok(text)
}

/// Compares contents with a file, and names the first byte that differs.
fn compare(image: &Image, path: &Path, bar: &ProgressBar) -> Result<()> {
    let (mut file, len_bytes) = open(path)?;
    let holds = image.len_bytes();
    ensure!(holds == len_bytes, "the image holds {holds} bytes, and {} has {len_bytes}", path.display());
    let mut contents = image.contents()?;
    let (mut left, mut right, mut at) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES], 0);
    loop {
        let [len, other] = [
            read_full(&mut contents, &mut left).context("reading the image")?,
            read_full(&mut file, &mut right).with_context(|| format!("reading {}", path.display()))?,
        ];
        let differs = left[..len].iter().zip(&right[..other]).position(|(left, right)| left != right);
        if let Some(n) = differs.or((len != other).then_some(len.min(other))) {
            bail!("byte {} of the image is not that of {}", at + n as u64, path.display());
        }
        if len == 0 {
            return Ok(());
        }
        at += len as u64;
        bar.set_position(at);
    }
}

fn info(path: &Path, format: Option<Format>, json: bool) -> Result<String> {
    let image = Image::open(path, format)?;
    let list = image.list()?;
    let pages_of =
        |kind| list.extents().filter(|extent| extent.kind == kind).map(|extent| extent.nr_pages).sum::<u64>();
    let (zero_pages, extents) = (pages_of(ExtentKind::Zero), list.extents().count());
    let image_bytes = std::fs::metadata(path)?.len();
    let (format, frames) = match &image {
        Image::Zstd(zstd) => ("zstd", Some((zstd.nr_frames(), zstd.granule_bytes(), zstd.contents_sha256()))),
        Image::Plain(..) => ("plain", None),
    };
    if json {
        let value = serde_json::json!({
            "image": path.to_string_lossy(),
            "format": format,
            "bytes": image.len_bytes(),
            "image_bytes": image_bytes,
            "page_size": page_size(),
            "pages": list.nr_pages(),
            "zero_pages": zero_pages,
            "extents": extents,
            "frames": frames.map(|(frames, ..)| frames),
            "granule_bytes": frames.map(|(_, granule, _)| granule),
            "sha256": frames.and_then(|(.., digest)| digest).map(|digest| hex(&digest)),
        });
        return Ok(serde_json::to_string_pretty(&value)? + "\n");
    }
    let mut text = format!(
        "image    {}, {format}, {image_bytes} bytes\n\
         holds    {} bytes, {} pages, of which {zero_pages} are zeros that cost no read\n\
         list     {extents} extents\n",
        path.display(),
        image.len_bytes(),
        list.nr_pages(),
    );
    if let Some((frames, granule, digest)) = frames {
        let digest = digest.map_or("none is named".into(), |digest| hex(&digest));
        text += &format!("frames   {frames}, granules of {granule} bytes\nsha256   {digest}\n");
    }
    Ok(text)
}

/// Opens what an image can be made of, and says why anything else can't.
fn open(path: &Path) -> Result<(File, u64)> {
    let shown = path.display();
    // Looked at before it is opened: opening a FIFO would wait for its writer.
    let kind = std::fs::metadata(path).with_context(|| format!("{shown} can't be examined"))?.file_type();
    ensure!(!kind.is_dir(), "{shown} is a directory, not a file");
    ensure!(kind.is_file() || kind.is_block_device(), "{shown} is neither a regular file nor a block device");
    let mut file = File::open(path).with_context(|| format!("{shown} can't be opened"))?;
    let len_bytes = file.seek(SeekFrom::End(0)).with_context(|| format!("the length of {shown}"))?;
    ensure!(len_bytes > 0, "{shown} is empty: it has no page");
    file.rewind()?;
    Ok((file, len_bytes))
}

/// Reads until the buffer is full or there is no more.
fn read_full(read: &mut impl Read, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match read.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// A bar for a terminal, beside the results; else none.
fn bar(len_bytes: u64) -> Result<ProgressBar> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(len_bytes) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}  {bytes_per_sec}  {eta}")?);
    Ok(bar)
}

/// Reads a size as `65536`, `64K` or `1M`.
fn parse_size(text: &str) -> std::result::Result<usize, String> {
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        unit => return Err(format!("{unit} is no unit: K or M")),
    };
    let number: usize = digits.parse().map_err(|error| format!("{digits}: {error}"))?;
    number.checked_mul(1 << unit).ok_or_else(|| format!("{text} is too much"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
