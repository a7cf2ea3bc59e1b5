//! Files that results go into.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A file that results go into. Opened first: nobody wants to hear after the measurement that it can't be written.
pub(crate) struct Output {
    path: PathBuf,
    file: File,
}

impl Output {
    pub(crate) fn open(path: &Path) -> Result<Output> {
        let options = File::options().read(true).write(true).create(true).truncate(false).open(path);
        Ok(Output {
            file: options.with_context(|| format!("opening {} for writing", path.display()))?,
            path: path.into(),
        })
    }

    pub(crate) fn read(&mut self) -> Result<String> {
        let mut text = String::new();
        self.file.read_to_string(&mut text).with_context(|| format!("reading {}", self.path.display()))?;
        Ok(text)
    }

    pub(crate) fn write(&mut self, text: &str) -> Result<()> {
        let replaced =
            self.file.set_len(0).and_then(|()| self.file.rewind()).and_then(|()| self.file.write_all(text.as_bytes()));
        replaced.with_context(|| format!("writing {}", self.path.display()))
    }
}

/// Puts a section into a document: between its markers, or at its end.
pub(crate) fn placed(document: &str, section: &str) -> String {
    const BEGIN: &str = "<!-- results: begin (written by --markdown) -->\n";
    const END: &str = "<!-- results: end -->\n";
    let (before, after) = match (document.split_once(BEGIN), document.split_once(END)) {
        (Some((before, _)), Some((_, after))) => (before, after),
        _ => (document, ""),
    };
    format!("{before}{BEGIN}\n{section}\n{END}{after}")
}
