//! Reading objects from end to end: every byte is under a checksum, every page under its hash.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use epochfs_format::{
    BIRTHS_PREFIX, Birth, Block, BlockKind, DESCRIPTOR_KEY, Descriptor, FooterEntry, FormatError, GC_LOG_PREFIX,
    GcRecord, HEADER_LEN, KeyRemoval, Lease, ObjectRef, PAGE_SIZE, PageDecoder, QUARANTINE_PREFIX, Quarantine, Record,
    Summary, TRAILER_LEN, Trailer, WrappedKey, check_header, hash_page, parse_id, parse_lease_key, record_seq,
    summary_key,
};

use super::state::Saving;
use super::{Named, Verifier, name_of};
use crate::error::{Error, Kind, Result};
use crate::platform::at_once::{AT_ONCE, at_once};
use crate::platform::store::{ObjectInfo, Store};
use crate::repo::object_key;

/// What reading an object came to.
#[derive(Debug, Default)]
pub struct ReadObject {
    pub pages: u64,
    /// Blocks that are not what the footer says, and why.
    pub bad: Vec<(FooterEntry, String)>,
}

/// Checks all bytes of an object. An error tells that it cannot be taken apart.
pub fn read_object(
    bytes: &[u8],
    repository: &[u8; 16],
    object: &ObjectRef,
    decoder: &mut PageDecoder,
) -> Result<ReadObject> {
    check_header(bytes, repository, object)?;
    let trailer = Trailer::decode(bytes, bytes.len() as u64)?;
    let footer = trailer.decode_footer(&bytes[trailer.footer_offset as usize..bytes.len() - TRAILER_LEN])?;
    let mut read = ReadObject::default();
    let mut page = [0; PAGE_SIZE];
    let mut end = HEADER_LEN;
    for entry in footer.iter() {
        let block = &bytes[entry.offset as usize..][..entry.len as usize];
        end = entry.offset as usize + entry.len as usize;
        let checked = Block::only(block, entry.kind).and_then(|block| {
            if entry.kind == BlockKind::Page {
                decoder.decode_unproven(block, &mut page)?;
            }
            Ok(())
        });
        let problem = match checked {
            Err(error) => Some(error.to_string()),
            Ok(()) if entry.kind == BlockKind::Page && hash_page(&page) != entry.hash => {
                Some("the page's content has another hash".to_owned())
            }
            Ok(()) => None,
        };
        read.pages += u64::from(entry.kind == BlockKind::Page);
        read.bad.extend(problem.map(|problem| (entry, problem)));
    }
    if end != trailer.footer_offset as usize {
        return Err(Error::damaged("it has bytes that its footer does not list"));
    }
    let record_bytes = &bytes[trailer.record_offset as usize..][..trailer.record_len as usize];
    match object {
        ObjectRef::Record { machine, seq } => {
            Record::decode_block(record_bytes, machine, *seq)?;
        }
        ObjectRef::Pack(_) if trailer.record_len != 0 => {
            return Err(Error::damaged("a pack holds a log record"));
        }
        ObjectRef::Pack(_) => {}
    }
    Ok(read)
}

/// Objects that are read together, of a store that is far away: so many, of so many bytes, and none that is longer.
const TOGETHER: usize = 4 * AT_ONCE;
const TOGETHER_LEN_MAX: u64 = 32 << 20;
const SMALL_LEN_MAX: u64 = 4 << 20;

/// Small objects that were read and not looked at yet.
#[derive(Default)]
struct Ahead {
    bytes: HashMap<String, Bytes>,
    /// So many of the listed ones were read, or left.
    reached: usize,
}

impl Ahead {
    /// The one at this place comes next.
    fn reach(&mut self, store: &dyn Store, all: &[ObjectInfo], at: usize) {
        if at < self.reached || !store.is_remote() {
            return;
        }
        let mut len = 0;
        let fits = |info: &&ObjectInfo| {
            len += info.len;
            info.len <= SMALL_LEN_MAX && len <= TOGETHER_LEN_MAX
        };
        let together: Vec<&ObjectInfo> = all[at..].iter().take(TOGETHER).take_while(fits).collect();
        self.reached = at + together.len().max(1);
        // One that cannot be read is read again when it is looked at, which tells what is wrong.
        let is_read = |info: &&&ObjectInfo| {
            matches!(name_of(&info.key), Named::Object(_) | Named::OfCollector | Named::Summary(..))
        };
        let together: Vec<&ObjectInfo> = together.iter().filter(is_read).copied().collect();
        let read = at_once(true, &together, &|info| match store.get(&info.key) {
            Err(error) if !error.kind().is_of_object() => Err(error),
            read => Ok(read.ok()),
        })
        .unwrap_or_default();
        let read = together.iter().zip(read).filter_map(|(info, bytes)| Some((info.key.clone(), bytes?)));
        self.bytes = read.collect();
    }

    fn take(&mut self, key: &str) -> Option<Bytes> {
        self.bytes.remove(key)
    }
}

impl Verifier<'_> {
    /// Reads all objects, or those that an interrupted verification had not come to, and those that it found damaged.
    pub fn check_objects(&mut self, saving: &mut Option<Saving<'_>>) -> Result<()> {
        let store = self.store.repository().objects().store().clone();
        let mut all: Vec<ObjectInfo> = Vec::new();
        store.list("", None, &mut |info| {
            all.push(info);
            Ok(true)
        })?;
        self.total = all.iter().map(|info| info.len).sum();
        let earlier = saving.as_mut().and_then(Saving::take_earlier);
        if let Some(earlier) = &earlier {
            self.read.objects = earlier.objects;
            self.read.bytes = earlier.bytes;
            self.read.pages = earlier.pages;
            self.read.resumed_at_bytes = earlier.bytes;
            self.read.unknown_objects.clone_from(&earlier.unknown_objects);
        }
        let was_read = |info: &ObjectInfo| earlier.as_ref().is_some_and(|earlier| info.key <= earlier.last);
        let is_left = |info: &ObjectInfo| {
            was_read(info) && earlier.as_ref().is_none_or(|earlier| !earlier.damaged.contains(&info.key))
        };
        all.retain(|info| !is_left(info));
        let mut ahead = Ahead::default();
        for (at, info) in all.iter().enumerate() {
            let was_read = was_read(info);
            let before = (self.read.objects, self.read.pages);
            ahead.reach(&*store, &all, at);
            self.check_listed(&info.key, ahead.take(&info.key))?;
            if was_read {
                // It was counted then.
                (self.read.objects, self.read.pages) = before;
                continue;
            }
            self.read.bytes += info.len;
            (self.on_bytes)(self.read.bytes, self.total.max(self.read.bytes));
            if let Some(saving) = saving {
                saving.note(&info.key, &self.read, self.problems.keys());
            }
        }
        if let Some(saving) = saving {
            saving.note_end(&self.read, self.problems.keys());
        }
        Ok(())
    }

    /// Reads an object again that may have been repaired.
    pub fn check_again(&mut self, object: &ObjectRef) -> Result<()> {
        let key = object_key(object);
        self.problems.remove(&key);
        self.damage.forget(object);
        let before = (self.read.objects, self.read.pages);
        let checked = self.check_listed(&key, None);
        (self.read.objects, self.read.pages) = before;
        checked
    }

    /// Forgets lists of damaged blocks that were damaged themselves; says whether there were any.
    pub fn forget_lists(&mut self) -> bool {
        let before = self.problems.len();
        self.problems.retain(|key, _| !key.starts_with(QUARANTINE_PREFIX));
        self.problems.len() < before
    }

    /// Reads a summary again that was made again.
    pub fn check_summary_again(&mut self, machine: &Arc<str>, to: u64) -> Result<()> {
        let key = summary_key(machine, to);
        self.problems.remove(&key);
        self.damage.summaries.remove(&(machine.clone(), to));
        let objects = self.read.objects;
        let checked = self.check_listed(&key, None);
        self.read.objects = objects;
        checked
    }

    /// Reads an object, unless its bytes are here already.
    fn check_listed(&mut self, key: &str, bytes: Option<Bytes>) -> Result<()> {
        self.read.objects += 1;
        let named = name_of(key);
        let checked = match &named {
            Named::Descriptor => self.check_descriptor(),
            // Those who read them find out what is wrong with them, and no epoch needs them.
            Named::Trace | Named::OfHost => Ok(()),
            Named::Key => self.check_key(key),
            Named::OfCollector => self.check_of_collector(key, bytes),
            Named::Quarantine => self.check_quarantine(key),
            Named::Summary(machine, to) => self.check_summary(machine, *to, bytes),
            Named::Object(object) => self.check_object(object, key, bytes),
            Named::Unknown => {
                self.read.unknown_objects.push(key.to_owned());
                Ok(())
            }
        };
        match (checked, named) {
            // Collected since it was listed. An epoch that needs it is found broken.
            (Err(error), _) if error.kind() == Kind::NotFound && key.starts_with("packs/") => {}
            (Err(error), named) if error.kind().is_of_object() => {
                self.problem(key, key, error);
                match named {
                    Named::Object(object) => drop(self.damage.suspects.insert(object)),
                    Named::Summary(machine, to) => drop(self.damage.summaries.insert((machine, to))),
                    _ => {}
                }
            }
            (other, _) => other?,
        }
        Ok(())
    }

    fn check_descriptor(&self) -> Result<()> {
        let bytes = self.store.repository().objects().store().get(DESCRIPTOR_KEY)?;
        let descriptor = Descriptor::decode(&bytes)?;
        if descriptor.id != *self.store.repository().id() {
            return Err(Error::damaged("the descriptor changed while the repository was open"));
        }
        Ok(())
    }

    fn check_key(&self, key: &str) -> Result<()> {
        let objects = self.store.repository().objects();
        let bytes = match objects.store().get(key) {
            Ok(bytes) => bytes,
            // Removed since.
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let name = key.rsplit('/').next().unwrap_or_default();
        let checked = match parse_id(name) {
            Some(id) => WrappedKey::decode(&bytes, objects.repository(), &id).map(|_| ()),
            None => KeyRemoval::decode(&bytes, objects.repository(), record_seq(key).unwrap_or_default()).map(|_| ()),
        };
        match checked {
            // Of a repository that was to be made here, and was not: a key to nothing.
            Err(FormatError::Mismatch { .. }) => Ok(()),
            checked => Ok(checked?),
        }
    }

    fn check_of_collector(&self, key: &str, bytes: Option<Bytes>) -> Result<()> {
        let objects = self.store.repository().objects();
        let bytes = match bytes.map_or_else(|| objects.store().get(key), Ok) {
            Ok(bytes) => bytes,
            // Leases come and go.
            Err(error) if error.kind() == Kind::NotFound && !key.starts_with(GC_LOG_PREFIX) => return Ok(()),
            Err(error) => return Err(error),
        };
        if let Some(named) = parse_lease_key(key) {
            let lease = Lease::decode(&bytes, objects.repository())?;
            if (lease.reader, lease.number) != named {
                return Err(Error::damaged("it is another reader's lease"));
            }
        } else if key.starts_with(BIRTHS_PREFIX) {
            Birth::decode(&bytes, objects.repository())?;
        } else {
            GcRecord::decode(&bytes, objects.repository(), record_seq(key).unwrap_or(0))?;
        }
        Ok(())
    }

    fn check_quarantine(&self, key: &str) -> Result<()> {
        let objects = self.store.repository().objects();
        match objects.store().get(key) {
            Ok(bytes) => Ok(Quarantine::decode(&bytes, objects.repository()).map(|_| ())?),
            // A repair has put another in its place.
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether it says what the records do is known once these are read.
    fn check_summary(&self, machine: &Arc<str>, to: u64, bytes: Option<Bytes>) -> Result<()> {
        let objects = self.store.repository().objects();
        let bytes = bytes.map_or_else(|| objects.store().get(&summary_key(machine, to)), Ok)?;
        Summary::decode(&bytes, objects.repository(), machine, to)?;
        Ok(())
    }

    fn check_object(&mut self, object: &ObjectRef, key: &str, bytes: Option<Bytes>) -> Result<()> {
        let objects = self.store.repository().objects();
        let (bytes, told) = match bytes.map_or_else(|| objects.store().get(key), Ok) {
            // What the store does not give out whole may have blocks that are sound.
            Err(error) if error.kind() == Kind::Damaged => (objects.store().get_damaged(key)?, Some(error)),
            bytes => (bytes?, None),
        };
        let read = read_object(&bytes, objects.repository(), object, &mut self.decoder)?;
        self.read.pages += read.pages;
        if let Some(error) = told.filter(|_| read.bad.is_empty()) {
            return Err(error);
        }
        for (entry, problem) in read.bad {
            self.damage.blocks.entry(object.clone()).or_default().push((entry.offset, entry.len));
            self.problem(key, format!("{key} at offset {}", entry.offset), problem);
        }
        Ok(())
    }
}
