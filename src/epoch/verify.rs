//! Verifying a repository: every object is read whole, every page proven, every reference followed.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use epochfs_format::{
    BIRTHS_PREFIX, Birth, Block, BlockKind, DESCRIPTOR_KEY, Descriptor, FANOUT, GC_LOG_PREFIX, GcRecord, HEADER_LEN,
    Hash, Lease, ObjectRef, PAGE_SIZE, PageDecoder, Place, RESERVE_KEY, Root, SUMMARY_STEP, Summary, TRAILER_LEN,
    Trailer, check_header, gc_record_key, hash_page, level_span, levels_for, log_prefix, parse_id, parse_lease_key,
    record_seq, summary_key,
};

use super::nodes::{Stored, describe};
use super::tree::{child, page_count};
use super::view::{EpochStore, commit_of, load_manifest};
use crate::error::{Error, Kind, Result};
use crate::platform::store::ObjectInfo;
use crate::repo::{Head, MachineState, Summing, machines, object_key};

/// Something wrong.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Problem {
    /// The object or epoch concerned.
    pub object: String,
    pub problem: String,
}

/// An epoch that cannot be read whole.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BrokenEpoch {
    pub machine: String,
    pub epoch: u64,
    /// The stream concerned, or nothing when it is the epoch itself.
    pub stream: Option<String>,
    /// Pages of the stream that cannot be read, as far as they were reached.
    pub pages: u64,
    /// Where they are, as far as they fit in a thousand ranges.
    pub ranges: Vec<PageRange>,
    pub problem: String,
}

/// Pages in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PageRange {
    pub first: u64,
    pub pages: u64,
}

const RANGES_MAX: usize = 1000;

/// What a verification found.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Verified {
    pub objects: u64,
    pub bytes: u64,
    pub pages: u64,
    pub machines: u64,
    pub epochs: u64,
    /// Damage in objects, whether an epoch needs what is damaged or not.
    pub problems: Vec<Problem>,
    pub broken_epochs: Vec<BrokenEpoch>,
    /// Objects that no format knows: left alone.
    pub unknown_objects: Vec<String>,
}

impl Verified {
    pub fn is_whole(&self) -> bool {
        self.problems.is_empty() && self.broken_epochs.is_empty()
    }

    fn problem(&mut self, object: impl Into<String>, problem: impl ToString) {
        self.problems.push(Problem { object: object.into(), problem: problem.to_string() });
    }
}

/// Damage is noted and the verification goes on; a failing store ends it.
fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), Kind::Damaged | Kind::NotFound | Kind::Unsupported)
}

struct Verifier<'a> {
    store: &'a EpochStore,
    verified: Verified,
    decoder: PageDecoder,
    /// Blocks found damaged, by object.
    bad: HashMap<ObjectRef, Vec<(u32, u32)>>,
    /// What stored summaries say, as hashes, by machine and last record.
    summaries: HashMap<Arc<str>, HashMap<u64, Hash>>,
    /// Nodes that were walked, with how many unreadable pages lie below.
    walked: HashMap<(Place, Hash, u8), u64>,
    on_bytes: &'a mut dyn FnMut(u64, u64),
    total: u64,
}

impl EpochStore {
    /// Reads and checks everything. `on_bytes` is told how many bytes of how many were read.
    pub fn verify(&self, on_bytes: &mut dyn FnMut(u64, u64)) -> Result<Verified> {
        let mut verifier = Verifier {
            store: self,
            verified: Verified::default(),
            decoder: PageDecoder::new(),
            bad: HashMap::new(),
            summaries: HashMap::new(),
            walked: HashMap::new(),
            on_bytes,
            total: 0,
        };
        // The logs first: whatever an epoch refers to that is in one now is in the listing that follows.
        let mut heads = Vec::new();
        for machine in machines(self.repository().objects())? {
            heads.push((machine.clone(), self.repository().log_head(&machine)));
        }
        verifier.check_objects()?;
        verifier.check_machines(heads)?;
        Ok(verifier.verified)
    }
}

impl Verifier<'_> {
    fn check_objects(&mut self) -> Result<()> {
        let store = self.store.repository().objects().store().clone();
        let mut all: Vec<ObjectInfo> = Vec::new();
        store.list("", None, &mut |info| {
            all.push(info);
            Ok(true)
        })?;
        self.total = all.iter().map(|info| info.len).sum();
        for info in all {
            self.verified.objects += 1;
            let checked = match name_of(&info.key) {
                Named::Descriptor => self.check_descriptor(),
                Named::Trace => Ok(()),
                Named::OfCollector => self.check_of_collector(&info.key),
                Named::Summary(machine, to) => self.check_summary(&machine, to),
                Named::Object(object) => self.check_object(&object, &info.key),
                Named::Unknown => {
                    self.verified.unknown_objects.push(info.key.clone());
                    Ok(())
                }
            };
            match checked {
                // Collected since it was listed. An epoch that needs it is found broken.
                Err(error) if error.kind() == Kind::NotFound && info.key.starts_with("packs/") => {}
                Err(error) if is_damage(&error) => self.verified.problem(&info.key, error),
                other => other?,
            }
            self.verified.bytes += info.len;
            (self.on_bytes)(self.verified.bytes, self.total);
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

    fn check_of_collector(&self, key: &str) -> Result<()> {
        let objects = self.store.repository().objects();
        let bytes = match objects.store().get(key) {
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

    /// Whether it says what the records do is known once these are read.
    fn check_summary(&mut self, machine: &Arc<str>, to: u64) -> Result<()> {
        let objects = self.store.repository().objects();
        let bytes = objects.store().get(&summary_key(machine, to))?;
        let summary = Summary::decode(&bytes, objects.repository(), machine, to)?;
        self.summaries.entry(machine.clone()).or_default().insert(to, summary_hash(&summary));
        Ok(())
    }

    /// Reads one object from end to end: every byte is under a checksum, every page under its hash.
    fn check_object(&mut self, object: &ObjectRef, key: &str) -> Result<()> {
        let objects = self.store.repository().objects();
        let bytes: Bytes = objects.store().get(key)?;
        check_header(&bytes, objects.repository(), object)?;
        let trailer = Trailer::decode(&bytes, bytes.len() as u64)?;
        let footer_end = bytes.len() - TRAILER_LEN;
        let footer = trailer.decode_footer(&bytes[trailer.footer_offset as usize..footer_end])?;
        let mut page = [0; PAGE_SIZE];
        let mut end = HEADER_LEN;
        for entry in footer.iter() {
            let block = &bytes[entry.offset as usize..][..entry.len as usize];
            end = entry.offset as usize + entry.len as usize;
            let checked = Block::only(block, entry.kind).and_then(|block| {
                if entry.kind == BlockKind::Page {
                    self.decoder.decode_unproven(block, &mut page)?;
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
            if entry.kind == BlockKind::Page {
                self.verified.pages += 1;
            }
            if let Some(problem) = problem {
                self.bad.entry(object.clone()).or_default().push((entry.offset, entry.len));
                self.verified.problem(format!("{key} at offset {}", entry.offset), problem);
            }
        }
        if end != trailer.footer_offset as usize {
            return Err(Error::damaged("it has bytes that its footer does not list"));
        }
        let record_bytes = &bytes[trailer.record_offset as usize..][..trailer.record_len as usize];
        match object {
            ObjectRef::Record { machine, seq } => {
                epochfs_format::Record::decode_block(record_bytes, machine, *seq)?;
            }
            ObjectRef::Pack(_) if trailer.record_len != 0 => {
                return Err(Error::damaged("a pack holds a log record"));
            }
            ObjectRef::Pack(_) => {}
        }
        Ok(())
    }

    fn check_machines(&mut self, heads: Vec<(Arc<str>, Result<Option<Head>>)>) -> Result<()> {
        for (machine, head) in heads {
            let checked = head.and_then(|head| head.map_or(Ok(()), |head| self.check_machine(&machine, &head)));
            match checked {
                Err(error) if is_damage(&error) => {
                    self.verified.problem(log_prefix(&machine), error);
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn check_machine(&mut self, machine: &Arc<str>, head: &Head) -> Result<()> {
        let repository = self.store.repository();
        if head.record.machine_exists() {
            self.verified.machines += 1;
        }
        let (mut summing, mut wrong) = (Summing::default(), Vec::new());
        let stored = self.summaries.remove(machine).unwrap_or_default();
        let replayed = repository.replay(head, &mut |record, digest| {
            if let Some(summary) = summing.add(record, digest)
                && stored.get(&summary.to).is_some_and(|found| *found != summary_hash(summary))
            {
                wrong.push(summary.to);
            }
        });
        for to in wrong {
            self.verified.problem(summary_key(machine, to), "it does not say what the records do");
        }
        let state = match replayed {
            Ok(state) => state,
            Err(error) if is_damage(&error) => {
                self.verified.problem(log_prefix(machine), &error);
                self.readable_epochs(machine, head.record.seq)?
            }
            Err(error) => return Err(error),
        };
        for record in state.epochs.values() {
            self.verified.epochs += 1;
            let (epoch, commit) = (record.seq, commit_of(record)?);
            let manifest = match load_manifest(self.store.nodes(), commit) {
                Ok(manifest) => manifest,
                Err(error) if is_damage(&error) => {
                    self.broken(machine, epoch, None, Vec::new(), &error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            for (path, image) in manifest.streams() {
                let Some(root) = &image.root else { continue };
                let level = levels_for(image.length) - 1;
                let error = match self.walk(root, level) {
                    Ok(0) => continue,
                    Ok(pages) => Error::damaged(format!("{pages} pages cannot be read")),
                    Err(error) if is_damage(&error) => error,
                    Err(error) => return Err(error),
                };
                let mut ranges = Vec::new();
                self.find_unreadable(root, level, 0, page_count(image.length), &mut ranges)?;
                self.broken(machine, epoch, Some(path), ranges, &error);
            }
        }
        Ok(())
    }

    /// Of a log with a damaged record, the epochs that can still be opened.
    fn readable_epochs(&mut self, machine: &Arc<str>, newest: u64) -> Result<MachineState> {
        let mut state = MachineState::default();
        for seq in 1..=newest {
            match self.store.repository().epoch_record(machine, seq) {
                Ok(record) => {
                    state.epochs.insert(seq, record);
                }
                Err(error) if error.kind() == Kind::Damaged => self.broken(machine, seq, None, Vec::new(), &error),
                Err(error) if is_damage(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(state)
    }

    fn broken(&mut self, machine: &Arc<str>, epoch: u64, stream: Option<&[u8]>, ranges: Vec<PageRange>, error: &Error) {
        // One that was dropped meanwhile may have been collected.
        let found = self.store.repository().epoch_record(machine, epoch);
        if found.is_err_and(|error| error.kind() == Kind::NotFound) {
            return;
        }
        self.verified.broken_epochs.push(BrokenEpoch {
            machine: machine.to_string(),
            epoch,
            stream: stream.map(|path| path.escape_ascii().to_string()),
            pages: ranges.iter().map(|range| range.pages).sum(),
            ranges,
            problem: error.to_string(),
        });
    }

    /// Follows a subtree; returns how many of its pages cannot be read.
    fn walk(&mut self, root: &Root, level: u8) -> Result<u64> {
        let key = (root.place.clone(), root.digest, level);
        if let Some(unreadable) = self.walked.get(&key) {
            return Ok(*unreadable);
        }
        let loaded = self.store.nodes().load(root, level)?;
        self.check_node_block(&root.place)?;
        if let Stored::Patch { base, .. } = &loaded.stored {
            self.check_node_block(base)?;
        }
        let mut unreadable = 0;
        if level == 0 {
            let claims: Vec<(Hash, Place)> = loaded.node.iter().map(|slot| (*slot.hash, slot.place())).collect();
            let answers = self.store.repository().objects().confirm_all(&claims);
            for ((_, place), answer) in claims.iter().zip(answers) {
                if !self.page_is_whole(place, answer)? {
                    unreadable += 1;
                }
            }
        } else {
            let slots: Vec<usize> = loaded.node.iter().map(|slot| slot.slot).collect();
            for slot in slots {
                let below = child(&loaded, slot).expect("the slot is full");
                unreadable += self.walk(&below, level - 1)?;
            }
        }
        self.walked.insert(key, unreadable);
        Ok(unreadable)
    }

    /// Where in a stream of so many pages a subtree that begins at page `first` cannot be read. Below a node that cannot
    /// be read nothing can.
    fn find_unreadable(
        &mut self,
        root: &Root,
        level: u8,
        first: u64,
        end: u64,
        ranges: &mut Vec<PageRange>,
    ) -> Result<()> {
        let span = level_span(level);
        let loaded = match self.store.nodes().load(root, level) {
            Ok(loaded) => loaded,
            Err(error) if is_damage(&error) => {
                add_range(ranges, first, (first + span * FANOUT as u64).min(end));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if level == 0 {
            let claims: Vec<(Hash, Place)> = loaded.node.iter().map(|slot| (*slot.hash, slot.place())).collect();
            let answers = self.store.repository().objects().confirm_all(&claims);
            for ((slot, (_, place)), answer) in loaded.node.iter().zip(&claims).zip(answers) {
                if !self.page_is_whole(place, answer)? {
                    let page = first + slot.slot as u64;
                    add_range(ranges, page, page + 1);
                }
            }
            return Ok(());
        }
        let slots: Vec<usize> = loaded.node.iter().map(|slot| slot.slot).collect();
        for slot in slots {
            let below = child(&loaded, slot).expect("the slot is full");
            match self.walk(&below, level - 1) {
                Ok(0) => {}
                Err(error) if !is_damage(&error) => return Err(error),
                _ => self.find_unreadable(&below, level - 1, first + slot as u64 * span, end, ranges)?,
            }
        }
        Ok(())
    }

    /// A node was read and proven; its object's footer must know it as well.
    fn check_node_block(&mut self, place: &Place) -> Result<()> {
        let footer = self.store.repository().objects().footer(&place.object)?;
        match footer.find(place.offset) {
            Some(entry) if entry.len == place.len && matches!(entry.kind, BlockKind::Node | BlockKind::Patch) => Ok(()),
            _ => Err(Error::damaged(format!("{}: the footer does not list this node", describe(place)))),
        }
    }

    /// Whether the page is where the tree says, and was found whole when its object was read.
    fn page_is_whole(&self, place: &Place, confirmed: Result<bool>) -> Result<bool> {
        let confirmed = match confirmed {
            Ok(confirmed) => confirmed,
            Err(error) if is_damage(&error) => false,
            Err(error) => return Err(error),
        };
        let bad = self.bad.get(&place.object);
        Ok(confirmed && !bad.is_some_and(|blocks| blocks.contains(&(place.offset, place.len))))
    }
}

fn add_range(ranges: &mut Vec<PageRange>, from: u64, to: u64) {
    let is_full = ranges.len() >= RANGES_MAX;
    match ranges.last_mut() {
        Some(last) if last.first + last.pages == from => last.pages += to - from,
        _ if is_full => {}
        _ => ranges.push(PageRange { first: from, pages: to - from }),
    }
}

enum Named {
    Descriptor,
    Object(ObjectRef),
    /// A hint, or room kept free: it makes no difference to any epoch.
    Trace,
    /// A record of the collector's log, or what readers and writers tell it.
    OfCollector,
    /// The summary of a machine's log up to this record.
    Summary(Arc<str>, u64),
    Unknown,
}

fn summary_hash(summary: &Summary) -> Hash {
    *blake3::hash(&summary.encode(&[0; 16])).as_bytes()
}

fn is_of_collector(key: &str) -> bool {
    let is_birth = key.strip_prefix(BIRTHS_PREFIX).is_some_and(|name| parse_id(name).is_some());
    let is_record = key.starts_with(GC_LOG_PREFIX) && record_seq(key).is_some_and(|seq| gc_record_key(seq) == key);
    is_birth || is_record || parse_lease_key(key).is_some()
}

/// What an object's key says that it is.
fn name_of(key: &str) -> Named {
    if key == DESCRIPTOR_KEY {
        return Named::Descriptor;
    }
    if key.starts_with("traces/") && epochfs_format::trace_seq(key).is_some() {
        return Named::Trace;
    }
    if key == RESERVE_KEY {
        return Named::Trace;
    }
    if is_of_collector(key) {
        return Named::OfCollector;
    }
    let object = if key.starts_with("packs/") {
        key.rsplit('/').next().and_then(parse_id).map(ObjectRef::Pack)
    } else if let Some(rest) = key.strip_prefix("machines/") {
        let machine = rest.split('/').next().and_then(epochfs_format::decode_component);
        if let Some((machine, to)) = machine.as_deref().zip(record_seq(key))
            && to > 0
            && to.is_multiple_of(SUMMARY_STEP)
            && summary_key(machine, to) == key
        {
            return Named::Summary(machine.into(), to);
        }
        machine.zip(record_seq(key)).map(|(machine, seq)| ObjectRef::Record { machine: machine.into(), seq })
    } else {
        None
    };
    match object {
        Some(object) if object_key(&object) == key => Named::Object(object),
        _ => Named::Unknown,
    }
}
