//! The journal of a machine's live: what a host knows about changes that no epoch holds yet.
//!
//! It lies beside the spool that holds the changed pages, on the host and not in the repository. It is a sequence of
//! frames; each carries its number and a checksum that covers the journal's random id, so that neither an old frame nor
//! one of another file is taken for the next. Frames up to one of kind [`JournalEntry::End`] are a group: they count all
//! or not at all. The first group makes up the whole state, each further one a change of it. A group is written only
//! after the one before is durable: so what is missing in front of a later group was lost by damage, and what is missing
//! in the last one may have been cut off by a crash.

use crate::error::{FormatError, Result, invalid};
use crate::manifest::{Attributes, EXTENDED_VALUE_LEN_MAX, Image};
use crate::name::{STREAM_PATH_LEN_MAX, check_machine};
use crate::wire::{Put, Reader};

const WHAT: &str = "journal";
const MAGIC: [u8; 8] = *b"EPOCHJNL";
const JOURNAL_VERSION: u16 = 1;
const FRAME_MAGIC: u32 = 0x4d52_464a;
/// Magic, number, group, kind, length of the body.
const FRAME_HEADER_LEN: usize = 4 + 8 + 8 + 1 + 4;
const CHECK_LEN: usize = 4;

/// The longest frame's body.
pub const JOURNAL_BODY_LEN_MAX: usize = 4 << 20;

/// So many pages fit into a frame with room to spare.
pub const JOURNAL_PAGES_MAX: usize = 32 << 10;

/// What the live lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalBase {
    pub repository: [u8; 16],
    pub machine: String,
    /// The epoch, or 0.
    pub epoch: u64,
    /// The term under which the host owns the machine.
    pub term: u64,
    /// The number that the next new file gets.
    pub next_node: u64,
}

/// What a file of the live is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JournalKind {
    /// Its length now, and the image below the changed pages.
    File {
        length: u64,
        base: Image,
    },
    Directory,
    Symlink(Vec<u8>),
}

/// One file, directory or symbolic link of the live: all there is to know but its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalNode {
    pub id: u64,
    /// The directory it is in; 0 for the topmost.
    pub parent: u64,
    pub name: Vec<u8>,
    pub attributes: Attributes,
    pub accessed_ns: i64,
    pub changed_ns: i64,
    pub kind: JournalKind,
}

/// A page in the spool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpooledPage {
    pub page: u64,
    pub slot: u32,
    /// CRC-32C of its bytes.
    pub check: u32,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JournalEntry {
    Base(JournalBase),
    Node(JournalNode),
    /// The node is no more.
    Gone(u64),
    /// These page ranges of the node are zeros, whatever was said before.
    Zeros {
        node: u64,
        ranges: Vec<(u64, u64)>,
    },
    /// These pages of the node lie in the spool.
    Pages {
        node: u64,
        pages: Vec<SpooledPage>,
    },
    /// The frames since the last such one count.
    End,
}

const BASE: u8 = 1;
const NODE: u8 = 2;
const GONE: u8 = 3;
const ZEROS: u8 = 4;
const PAGES: u8 = 5;
const END: u8 = 6;

const KIND_FILE: u8 = 0;
const KIND_DIRECTORY: u8 = 1;
const KIND_SYMLINK: u8 = 2;

/// Makes a journal's bytes.
pub struct JournalWriter {
    id: [u8; 16],
    number: u64,
    group: u64,
}

impl JournalWriter {
    /// Begins a journal with a new random id: appends its header.
    pub fn begin(id: [u8; 16], out: &mut Vec<u8>) -> Self {
        let start = out.len();
        out.put(&MAGIC);
        out.put_u16(JOURNAL_VERSION);
        out.put(&id);
        let check = crc32c::crc32c(&out[start..]);
        out.put_u32(check);
        Self { id, number: 0, group: 0 }
    }

    /// Appends the next frame. One that would be too long is refused.
    pub fn put(&mut self, entry: &JournalEntry, out: &mut Vec<u8>) -> Result<()> {
        entry.put_frame(&self.id, self.number, self.group, out)?;
        self.number += 1;
        if *entry == JournalEntry::End {
            self.group += 1;
        }
        Ok(())
    }
}

const HEADER_LEN: usize = 8 + 2 + 16 + 4;

fn check_of(id: &[u8; 16], frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(id), frame)
}

impl JournalEntry {
    fn kind(&self) -> u8 {
        match self {
            Self::Base(_) => BASE,
            Self::Node(_) => NODE,
            Self::Gone(_) => GONE,
            Self::Zeros { .. } => ZEROS,
            Self::Pages { .. } => PAGES,
            Self::End => END,
        }
    }

    fn put_frame(&self, id: &[u8; 16], number: u64, group: u64, out: &mut Vec<u8>) -> Result<()> {
        let start = out.len();
        out.put_u32(FRAME_MAGIC);
        out.put_u64(number);
        out.put_u64(group);
        out.put_u8(self.kind());
        out.put_u32(0);
        let body = out.len();
        self.put_body(out);
        let len = out.len() - body;
        if len > JOURNAL_BODY_LEN_MAX {
            out.truncate(start);
            return invalid(WHAT, "a file's attributes are more than a frame holds");
        }
        out[body - 4..body].copy_from_slice(&(len as u32).to_le_bytes());
        let check = check_of(id, &out[start..]);
        out.put_u32(check);
        Ok(())
    }

    fn put_body(&self, out: &mut Vec<u8>) {
        match self {
            Self::Base(base) => {
                out.put(&base.repository);
                out.put_short(base.machine.as_bytes());
                out.put_u64(base.epoch);
                out.put_u64(base.term);
                out.put_u64(base.next_node);
            }
            Self::Node(node) => node.put(out),
            Self::Gone(node) => out.put_u64(*node),
            Self::Zeros { node, ranges } => {
                out.put_u64(*node);
                out.put_u32(u32::try_from(ranges.len()).expect("a frame holds fewer than 4 billion ranges"));
                for (start, end) in ranges {
                    out.put_u64(*start);
                    out.put_u64(*end);
                }
            }
            Self::Pages { node, pages } => {
                out.put_u64(*node);
                out.put_u32(u32::try_from(pages.len()).expect("a frame holds fewer than 4 billion pages"));
                for page in pages {
                    out.put_u64(page.page);
                    out.put_u32(page.slot);
                    out.put_u32(page.check);
                }
            }
            Self::End => {}
        }
    }

    fn read(kind: u8, body: &[u8]) -> Result<Self> {
        let mut from = Reader::new(WHAT, body);
        let entry = match kind {
            BASE => {
                let repository = from.array()?;
                let machine = from.short_text()?.to_owned();
                check_machine(&machine)?;
                Self::Base(JournalBase {
                    repository,
                    machine,
                    epoch: from.u64()?,
                    term: from.u64()?,
                    next_node: from.u64()?,
                })
            }
            NODE => Self::Node(JournalNode::read(&mut from)?),
            GONE => Self::Gone(from.u64()?),
            ZEROS => {
                let node = from.u64()?;
                let count = from.u32()? as usize;
                let mut ranges = Vec::with_capacity(from.bounded(count, 16)?);
                for _ in 0..count {
                    let range = (from.u64()?, from.u64()?);
                    if range.0 >= range.1 {
                        return invalid(WHAT, "a range of zeros is empty");
                    }
                    ranges.push(range);
                }
                Self::Zeros { node, ranges }
            }
            PAGES => {
                let node = from.u64()?;
                let count = from.u32()? as usize;
                let mut pages = Vec::with_capacity(from.bounded(count, 16)?);
                for _ in 0..count {
                    pages.push(SpooledPage { page: from.u64()?, slot: from.u32()?, check: from.u32()? });
                }
                Self::Pages { node, pages }
            }
            END => Self::End,
            _ => return invalid(WHAT, "a frame's kind is unknown"),
        };
        from.end()?;
        Ok(entry)
    }
}

impl JournalNode {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_u64(self.id);
        out.put_u64(self.parent);
        out.put_medium(&self.name);
        let attributes = &self.attributes;
        out.put_u32(attributes.mode);
        out.put_u32(attributes.owner);
        out.put_u32(attributes.group);
        out.put_i64(attributes.modified_ns);
        out.put_i64(self.accessed_ns);
        out.put_i64(self.changed_ns);
        out.put_u16(u16::try_from(attributes.extended.len()).expect("a file's attributes are bounded"));
        for (name, value) in &attributes.extended {
            out.put_short(name);
            out.put_long(value);
        }
        match &self.kind {
            JournalKind::File { length, base } => {
                out.put_u8(KIND_FILE);
                out.put_u64(*length);
                base.put(None, out);
            }
            JournalKind::Directory => out.put_u8(KIND_DIRECTORY),
            JournalKind::Symlink(target) => {
                out.put_u8(KIND_SYMLINK);
                out.put_medium(target);
            }
        }
    }

    fn read(from: &mut Reader<'_>) -> Result<Self> {
        let (id, parent) = (from.u64()?, from.u64()?);
        let name = from.medium_bytes()?.to_vec();
        let mut attributes = Attributes {
            mode: from.u32()?,
            owner: from.u32()?,
            group: from.u32()?,
            modified_ns: from.i64()?,
            extended: Vec::new(),
        };
        let (accessed_ns, changed_ns) = (from.i64()?, from.i64()?);
        let count = usize::from(from.u16()?);
        attributes.extended.reserve(from.bounded(count, 1 + 4)?);
        for _ in 0..count {
            let name = from.short_bytes()?.to_vec();
            let value = from.long_bytes()?;
            if value.len() > EXTENDED_VALUE_LEN_MAX {
                return invalid(WHAT, "an extended attribute is longer than 64 KiB");
            }
            attributes.extended.push((name, value.to_vec()));
        }
        let kind = match from.u8()? {
            KIND_FILE => JournalKind::File { length: from.u64()?, base: Image::read(None, from)? },
            KIND_DIRECTORY => JournalKind::Directory,
            KIND_SYMLINK => JournalKind::Symlink(from.medium_bytes()?.to_vec()),
            _ => return invalid(WHAT, "a file's kind is unknown"),
        };
        if name.len() > STREAM_PATH_LEN_MAX {
            return invalid(WHAT, "a file's name is too long");
        }
        Ok(Self { id, parent, name, attributes, accessed_ns, changed_ns, kind })
    }
}

/// Reads a journal's frames.
pub struct JournalReader<'a> {
    id: [u8; 16],
    bytes: &'a [u8],
    at: usize,
    number: u64,
    group: u64,
}

impl<'a> JournalReader<'a> {
    /// Checks the header.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        let mut from = Reader::new(WHAT, bytes);
        if from.array()? != MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        let version = from.u16()?;
        if version > JOURNAL_VERSION {
            return Err(FormatError::NewerVersion { what: WHAT, found: version });
        }
        let id = from.array()?;
        if from.u32()? != crc32c::crc32c(&bytes[..HEADER_LEN - 4]) {
            return Err(FormatError::Checksum { what: WHAT });
        }
        Ok(Self { id, bytes, at: HEADER_LEN, number: 0, group: 0 })
    }

    /// The next frame, or `None` at the end: where the bytes end, or where the last write was cut off. Damage in front of
    /// a later group is an error.
    #[allow(clippy::should_implement_trait)] // An iterator would go on after an error.
    pub fn next(&mut self) -> Result<Option<JournalEntry>> {
        match self.frame(self.at) {
            Some(frame) if (frame.number, frame.group) == (self.number, self.group) => {
                let entry = JournalEntry::read(frame.kind, frame.body)?;
                self.at += FRAME_HEADER_LEN + frame.body.len() + CHECK_LEN;
                self.number += 1;
                self.group += u64::from(entry == JournalEntry::End);
                Ok(Some(entry))
            }
            Some(_) => invalid(WHAT, "a frame is not the next one"),
            None if self.continues() => Err(FormatError::Checksum { what: WHAT }),
            None => Ok(None),
        }
    }

    /// The frame that begins here, if one does and it is whole.
    fn frame(&self, at: usize) -> Option<Frame<'a>> {
        let mut from = Reader::new(WHAT, self.bytes.get(at..at + FRAME_HEADER_LEN)?);
        if from.u32().ok()? != FRAME_MAGIC {
            return None;
        }
        let (number, group) = (from.u64().ok()?, from.u64().ok()?);
        let (kind, len) = (from.u8().ok()?, from.u32().ok()? as usize);
        if len > JOURNAL_BODY_LEN_MAX {
            return None;
        }
        let body = at + FRAME_HEADER_LEN;
        let check = self.bytes.get(body + len..body + len + CHECK_LEN)?;
        let is_whole = check == check_of(&self.id, &self.bytes[at..body + len]).to_le_bytes();
        is_whole.then(|| Frame { number, group, kind, body: &self.bytes[body..body + len] })
    }

    /// Whether a frame of a later group lies further on: then what is here was durable once.
    fn continues(&self) -> bool {
        let magic = FRAME_MAGIC.to_le_bytes();
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        rest.windows(magic.len()).enumerate().any(|(offset, window)| {
            window == magic && self.frame(self.at + offset).is_some_and(|frame| frame.group > self.group)
        })
    }
}

struct Frame<'a> {
    number: u64,
    group: u64,
    kind: u8,
    body: &'a [u8],
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: [u8; 16] = [7; 16];

    fn entries() -> Vec<JournalEntry> {
        let attributes =
            Attributes { mode: 0o644, extended: vec![(b"user.a".to_vec(), vec![1])], ..Default::default() };
        let node = |id, kind| {
            JournalEntry::Node(JournalNode {
                id,
                parent: 1,
                name: b"memory".to_vec(),
                attributes: attributes.clone(),
                accessed_ns: -1,
                changed_ns: 2,
                kind,
            })
        };
        vec![
            JournalEntry::Base(JournalBase {
                repository: [3; 16],
                machine: "web1".into(),
                epoch: 4,
                term: 2,
                next_node: 9,
            }),
            node(2, JournalKind::File { length: 5, base: Image::default() }),
            node(3, JournalKind::Directory),
            node(4, JournalKind::Symlink(b"memory".to_vec())),
            JournalEntry::Gone(5),
            JournalEntry::Zeros { node: 2, ranges: vec![(0, 7), (9, u64::MAX)] },
            JournalEntry::Pages { node: 2, pages: vec![SpooledPage { page: 8, slot: 1, check: 0xdead_beef }] },
            JournalEntry::End,
        ]
    }

    /// Two groups, and where the second begins.
    fn encoded() -> (Vec<u8>, usize) {
        let mut bytes = Vec::new();
        let mut writer = JournalWriter::begin(ID, &mut bytes);
        for entry in entries() {
            writer.put(&entry, &mut bytes).unwrap();
        }
        let second = bytes.len();
        for entry in entries() {
            writer.put(&entry, &mut bytes).unwrap();
        }
        (bytes, second)
    }

    fn read(bytes: &[u8]) -> Result<Vec<JournalEntry>> {
        let mut reader = JournalReader::new(bytes)?;
        let mut all = Vec::new();
        while let Some(entry) = reader.next()? {
            all.push(entry);
        }
        Ok(all)
    }

    #[test]
    fn frames_come_back() {
        assert_eq!(read(&encoded().0).unwrap(), [entries(), entries()].concat());
    }

    #[test]
    fn a_cut_journal_ends_before_the_cut_frame() {
        let (bytes, _) = encoded();
        let all = [entries(), entries()].concat();
        for len in HEADER_LEN..bytes.len() {
            let some = read(&bytes[..len]).unwrap();
            assert!(some.len() < all.len() && all.starts_with(&some), "cut at {len}");
        }
        for len in 0..HEADER_LEN {
            assert!(read(&bytes[..len]).is_err(), "cut at {len}");
        }
    }

    /// A crash may leave any part of the last group's bytes; anything before was durable.
    #[test]
    fn a_flipped_bit_is_noticed_in_front_of_a_later_group() {
        let (bytes, second) = encoded();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            match read(&damaged) {
                Err(_) => assert!(at < second, "byte {at} is in the last group"),
                Ok(some) => assert!(at >= second && some.len() >= entries().len(), "byte {at}"),
            }
        }
    }

    #[test]
    fn a_frame_of_another_journal_is_none() {
        let mut bytes = Vec::new();
        JournalWriter::begin(ID, &mut bytes);
        JournalEntry::End.put_frame(&[8; 16], 0, 0, &mut bytes).unwrap();
        assert_eq!(read(&bytes).unwrap(), []);
    }
}
