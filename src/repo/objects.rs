//! Reading objects that hold blocks: single blocks, footers, log records.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use epochfs_format::{
    BLOCK_HEADER_LEN, BlockKind, FOOTER_ENTRY_LEN, Footer, FooterBuilder, HEADER_LEN, Hash, ObjectRef, PACKS_PREFIX,
    PAGE_SIZE, PageDecoder, Place, Record, TRAILER_LEN, Trailer, check_header, encode_header, pack_key, parse_pack_key,
    record_key,
};

use super::cache::TwoGenerations;
use super::quarantine::{Lists, Quarantined};
use crate::error::{Error, Kind, Result};
use crate::platform::at_once::at_once;
use crate::platform::lock::lock;
use crate::platform::memory::SpareBuffers;
use crate::platform::store::{Put, Store, Tail};

/// The end of a record that is read first: enough for a small one, its roots included.
const RECORD_TAIL_LEN: u64 = 32 << 10;
/// The same of one that is wanted with the blocks that lie in it, from a store that is far away: all of it, as a rule.
const RECORD_LEN: u64 = 256 << 10;
const FOOTER_CACHE_LEN: usize = 24 << 20;
const TAIL_CACHE_LEN: usize = 4 << 20;
const EXISTING_LEN: usize = 1 << 20;

/// No longer buffer is kept for the next commit: a record's blocks fit into it.
const SPARE_LEN_MAX: usize = 4 << 20;

/// What remembering that an object exists weighs.
const EXISTING_WEIGHT: usize = 64;

/// So many pages of one object are confirmed by its footer, which costs as much as about as many blocks.
const FOOTER_FROM_CLAIMS: usize = 256;

/// A put of which a remote store does not say what became is tried so often.
const PUT_TRIES: usize = 2;
const PUT_PAUSE: Duration = Duration::from_millis(200);

/// The key under which an object is stored.
pub fn object_key(object: &ObjectRef) -> String {
    match object {
        ObjectRef::Pack(id) => pack_key(id),
        ObjectRef::Record { machine, seq } => record_key(machine, *seq),
    }
}

/// The objects of one repository.
pub struct Objects {
    store: Arc<dyn Store>,
    repository: [u8; 16],
    footers: Mutex<TwoGenerations<ObjectRef, Arc<Footer>>>,
    /// The ends of records read lately, which hold the roots of their trees.
    tails: Mutex<TwoGenerations<ObjectRef, Tail>>,
    /// Objects that the store was asked for, and has as they were, since a collector's work was last heard of: what is kept
    /// of one on this host says nothing about that.
    existing: Mutex<TwoGenerations<ObjectRef, ()>>,
    /// How often something was forgotten: what was asked for before may be what was to be forgotten.
    forgets: AtomicU64,
    /// Decoders that nobody uses just now: making one costs more than a page.
    decoders: Mutex<Vec<PageDecoder>>,
    /// For the blocks of a commit.
    spare_buffers: SpareBuffers,
    quarantine: Lists,
}

impl Objects {
    pub fn new(store: Arc<dyn Store>, repository: [u8; 16]) -> Self {
        Self {
            store,
            repository,
            footers: Mutex::new(TwoGenerations::new(FOOTER_CACHE_LEN)),
            tails: Mutex::new(TwoGenerations::new(TAIL_CACHE_LEN)),
            existing: Mutex::new(TwoGenerations::new(EXISTING_LEN)),
            forgets: AtomicU64::new(0),
            decoders: Mutex::new(Vec::new()),
            spare_buffers: SpareBuffers::new(1, SPARE_LEN_MAX),
            quarantine: Lists::default(),
        }
    }

    /// All packs, with their lengths.
    pub fn packs(&self, each: &mut dyn FnMut([u8; 16], u64)) -> Result<()> {
        self.store.list(PACKS_PREFIX, None, &mut |info| {
            if let Some(id) = parse_pack_key(&info.key) {
                each(id, info.len);
            }
            Ok(true)
        })
    }

    /// The blocks that no commit may take a page from, as far as they were looked for.
    pub fn quarantined(&self) -> Arc<Quarantined> {
        self.quarantine.known()
    }

    /// The same, looked for now; or a moment ago, if the store is far away.
    pub fn look_for_quarantined(&self) -> Result<Arc<Quarantined>> {
        self.quarantine.look(&*self.store, &self.repository)
    }

    /// Lists these blocks, and no others, as damaged: of each object the offsets and lengths, all in rising order.
    pub fn quarantine(&self, blocks: &[(ObjectRef, Vec<(u32, u32)>)]) -> Result<u64> {
        self.quarantine.write(&*self.store, &self.repository, blocks)
    }

    /// Puts a repaired object in the place of the damaged one, and forgets what was kept of that.
    pub fn replace(&self, object: &ObjectRef, bytes: &[u8]) -> Result<()> {
        let replaced = self.store.replace(&object_key(object), bytes);
        lock(&self.footers).remove(object);
        lock(&self.tails).remove(object);
        replaced
    }

    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Bytes of all that is kept of objects for the next time.
    pub fn cached_len(&self) -> u64 {
        (lock(&self.footers).weight() + lock(&self.tails).weight()) as u64
    }

    /// The repository's id, which every object's header carries.
    pub fn repository(&self) -> &[u8; 16] {
        &self.repository
    }

    /// For the blocks of a commit.
    pub(super) fn spare_buffers(&self) -> &SpareBuffers {
        &self.spare_buffers
    }

    /// The bytes of one block, not yet checked.
    pub fn read(&self, place: &Place) -> Result<Bytes> {
        self.read_range(&place.object, place.offset, place.len)
    }

    /// Any bytes of an object.
    pub fn read_range(&self, object: &ObjectRef, offset: u32, len: u32) -> Result<Bytes> {
        let range = u64::from(offset)..u64::from(offset) + u64::from(len);
        match self.tail_range(object, &range) {
            Some(bytes) => Ok(bytes),
            None => self.store.get_range(&object_key(object), range).map_err(missing_is_damage),
        }
    }

    /// The same into a buffer.
    pub fn read_into(&self, object: &ObjectRef, offset: u32, buffer: &mut [u8]) -> Result<()> {
        let start = u64::from(offset);
        match self.tail_range(object, &(start..start + buffer.len() as u64)) {
            Some(bytes) => {
                buffer.copy_from_slice(&bytes);
                Ok(())
            }
            None => self.store.read_into(&object_key(object), start, buffer).map_err(missing_is_damage),
        }
    }

    /// Forgets what is kept of an object, whose bytes were found wrong; says whether it is worth while to read it again.
    pub fn distrust(&self, object: &ObjectRef) -> bool {
        lock(&self.footers).remove(object);
        let had_tail = lock(&self.tails).remove(object);
        self.store.distrust(&object_key(object)) || had_tail
    }

    /// Bytes of an object that will be read soon.
    pub fn will_need(&self, object: &ObjectRef, range: Range<u64>) {
        if self.tail_range(object, &range).is_none() {
            self.store.will_need(&object_key(object), range);
        }
    }

    /// The same of a block.
    pub fn will_need_block(&self, place: &Place) {
        self.will_need(&place.object, place.range());
    }

    /// These bytes of a record that was read lately.
    fn tail_range(&self, object: &ObjectRef, range: &Range<u64>) -> Option<Bytes> {
        if !is_record(object) {
            return None;
        }
        let tail = lock(&self.tails).get(object)?;
        let tail_start = tail.object_len - tail.bytes.len() as u64;
        let within = range.start >= tail_start && range.end <= tail.object_len;
        within.then(|| tail.bytes.slice((range.start - tail_start) as usize..(range.end - tail_start) as usize))
    }

    /// Puts an object unless its key is taken. Where the store does not say what became of it, the same bytes are put
    /// again: if an earlier try arrived after all, the key is taken, and whoever is told so reads back by whom.
    pub fn put_until_known(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        for _ in 1..PUT_TRIES {
            match self.store.put_if_absent(key, parts) {
                Err(error) if error.kind() == Kind::Unavailable => {
                    tracing::warn!("{error}: trying again");
                    std::thread::sleep(PUT_PAUSE);
                }
                known => return known,
            }
        }
        self.store.put_if_absent(key, parts)
    }

    /// A log record and its digest, or `None` when the log has no such record.
    pub fn record(&self, machine: &Arc<str>, seq: u64) -> Result<Option<(Record, Hash)>> {
        self.record_by_tail(machine, seq, RECORD_TAIL_LEN)
    }

    /// The same of a record whose blocks will be read: they come with it.
    pub fn record_with_blocks(&self, machine: &Arc<str>, seq: u64) -> Result<Option<(Record, Hash)>> {
        self.record_by_tail(machine, seq, if self.store.is_remote() { RECORD_LEN } else { RECORD_TAIL_LEN })
    }

    fn record_by_tail(&self, machine: &Arc<str>, seq: u64, tail_len: u64) -> Result<Option<(Record, Hash)>> {
        let object = ObjectRef::Record { machine: machine.clone(), seq };
        let key = object_key(&object);
        let tail = match self.store.get_tail(&key, tail_len) {
            Ok(tail) => tail,
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let (tail, decoded) = match self.decode_record(&object, &tail) {
            // It may have been emptied between two reads.
            Err(error) if error.kind() == Kind::Damaged => {
                self.distrust(&object);
                let tail = self.store.get_tail(&key, tail_len)?;
                let decoded = self.decode_record(&object, &tail);
                (tail, decoded)
            }
            decoded => (tail, decoded),
        };
        let decoded = decoded.map_err(|error| error.context(&key))?;
        let weight = tail.bytes.len();
        lock(&self.tails).insert(object, tail, weight);
        Ok(Some(decoded))
    }

    fn decode_record(&self, object: &ObjectRef, tail: &Tail) -> Result<(Record, Hash)> {
        let ObjectRef::Record { machine, seq } = object else { unreachable!("only records are asked for here") };
        let (_, block) = self.record_block(object, tail)?;
        Ok(Record::decode_block(&block, machine, *seq)?)
    }

    /// The block of the record itself, and what tells where it lies.
    fn record_block(&self, object: &ObjectRef, tail: &Tail) -> Result<(Trailer, Bytes)> {
        let start = tail.object_len - tail.bytes.len() as u64;
        if start == 0 {
            check_header(&tail.bytes, &self.repository, object)?;
        } else {
            // A newer program's record must be refused for what it is, not for what this program makes of it.
            let header = self.store.get_range(&object_key(object), 0..HEADER_LEN as u64)?;
            check_header(&header, &self.repository, object)?;
        }
        let trailer = Trailer::decode(&tail.bytes, tail.object_len)?;
        let offset = u64::from(trailer.record_offset);
        let end = offset + u64::from(trailer.record_len);
        let block = if offset >= start && end <= tail.object_len {
            tail.bytes.slice((offset - start) as usize..(end - start) as usize)
        } else {
            self.read_range(object, trailer.record_offset, trailer.record_len)?
        };
        Ok((trailer, block))
    }

    /// How many bytes the blocks take that lie in a record which was just read: what emptying it would give back.
    pub fn blocks_len(&self, machine: &Arc<str>, seq: u64) -> Result<u32> {
        let object = ObjectRef::Record { machine: machine.clone(), seq };
        let tail = match lock(&self.tails).get(&object) {
            Some(tail) => tail,
            None => self.store.get_tail(&object_key(&object), RECORD_TAIL_LEN)?,
        };
        let trailer = Trailer::decode(&tail.bytes, tail.object_len)?;
        let listed = (BLOCK_HEADER_LEN + FOOTER_ENTRY_LEN) as u32;
        Ok(trailer.record_offset.saturating_sub(HEADER_LEN as u32) + trailer.footer_len.saturating_sub(listed))
    }

    /// Puts a record in its own place without the blocks that lay in it; returns how many bytes that gave back.
    pub fn empty_record(&self, machine: &Arc<str>, seq: u64) -> Result<u64> {
        let object = ObjectRef::Record { machine: machine.clone(), seq };
        let key = object_key(&object);
        let read = || -> Result<(Tail, Trailer, Bytes)> {
            // What is kept of it here may be older than what is there.
            self.distrust(&object);
            let tail = self.store.get_tail(&key, RECORD_TAIL_LEN)?;
            let (trailer, block) = self.record_block(&object, &tail)?;
            Record::decode_block(&block, machine, seq)?;
            Ok((tail, trailer, block))
        };
        let (tail, trailer, block) = match read() {
            // Another collector may have emptied it between two reads.
            Err(error) if error.kind() == Kind::Damaged => read(),
            read => read,
        }
        .map_err(|error| error.context(&key))?;
        if trailer.record_offset == HEADER_LEN as u32 {
            return Ok(0);
        }
        let bare = bare_record(&self.repository, &object, &block);
        self.replace(&object, &bare)?;
        Ok(tail.object_len.saturating_sub(bare.len() as u64))
    }

    /// The list of an object's blocks.
    pub fn footer(&self, object: &ObjectRef) -> Result<Arc<Footer>> {
        if let Some(footer) = lock(&self.footers).get(object) {
            return Ok(footer);
        }
        let forgets = self.forgets.load(Ordering::Acquire);
        let read = match self.read_footer(object) {
            Err(error) if error.kind() == Kind::Damaged && (self.distrust(object) || is_record(object)) => {
                self.read_footer(object)
            }
            read => read,
        };
        let footer = Arc::new(read.map_err(|error| error.context(object_key(object)))?);
        let mut footers = lock(&self.footers);
        if self.forgets.load(Ordering::Acquire) == forgets {
            footers.insert(object.clone(), footer.clone(), footer.weight());
        }
        Ok(footer)
    }

    fn read_footer(&self, object: &ObjectRef) -> Result<Footer> {
        let key = object_key(object);
        let tail = self.store.get_tail(&key, 64 << 10)?;
        let start = tail.object_len - tail.bytes.len() as u64;
        let header = if start == 0 { tail.bytes.clone() } else { self.store.get_range(&key, 0..HEADER_LEN as u64)? };
        check_header(&header, &self.repository, object)?;
        let trailer = Trailer::decode(&tail.bytes, tail.object_len)?;
        let offset = u64::from(trailer.footer_offset);
        let end = tail.object_len - TRAILER_LEN as u64;
        let block = if offset >= start {
            tail.bytes.slice((offset - start) as usize..(end - start) as usize)
        } else {
            self.store.get_range(&key, offset..end)?
        };
        Ok(trailer.decode_footer(&block)?)
    }

    /// Forgets what is known of an object that is gone, or was emptied: what it held, and that it was there.
    pub(super) fn forget(&self, object: &ObjectRef) {
        self.forgets.fetch_add(1, Ordering::AcqRel);
        lock(&self.footers).remove(object);
        lock(&self.tails).remove(object);
        lock(&self.existing).remove(object);
        self.store.distrust(&object_key(object));
    }

    /// The same of all objects: any of them may be gone.
    pub(super) fn forget_all(&self) {
        self.forgets.fetch_add(1, Ordering::AcqRel);
        *lock(&self.tails) = TwoGenerations::new(TAIL_CACHE_LEN);
        *lock(&self.footers) = TwoGenerations::new(FOOTER_CACHE_LEN);
        *lock(&self.existing) = TwoGenerations::new(EXISTING_LEN);
        self.store.let_go();
    }

    /// Whether pages with these hashes really lie at these places: what the index says is only believed after this.
    ///
    /// Of an object that holds many of them, the footer tells. Of one that holds few, and whose footer is not at hand,
    /// the blocks themselves are read and proven: footers are large, and many at a time would not stay cached.
    pub fn confirm_all(&self, claims: &[(Hash, Place)]) -> Vec<Result<bool>> {
        let mut order: Vec<usize> = (0..claims.len()).collect();
        order.sort_by(|a, b| {
            let (a, b) = (&claims[*a].1, &claims[*b].1);
            (&a.object, a.offset).cmp(&(&b.object, b.offset))
        });
        let mut answers: Vec<Result<bool>> = claims.iter().map(|_| Ok(false)).collect();
        let mut decoder = None;
        let groups = || order.chunk_by(|a, b| claims[*a].1.object == claims[*b].1.object);
        let mut asked = self.ask_for(groups().map(|group| &claims[group[0]].1.object));
        for group in groups() {
            let object = &claims[group[0]].1.object;
            // A record's footer is small, and tells by how long it is whether it still has its blocks.
            let by_footer =
                is_record(object) || group.len() >= FOOTER_FROM_CLAIMS || lock(&self.footers).get(object).is_some();
            if !by_footer && group.len() > 1 && self.store.is_remote() {
                group.iter().for_each(|claim| self.will_need_block(&claims[*claim].1));
            }
            let exists = asked.remove(object).unwrap_or_else(|| self.exists(object));
            let mut is_gone = matches!(exists, Ok(false));
            for claim in group {
                let (hash, place) = &claims[*claim];
                answers[*claim] = if is_gone {
                    // Asking again for what a collector took away would tell the same.
                    Err(Error::not_found(format!("there are no blocks of {}", object_key(object))))
                } else if let Err(error) = &exists {
                    Err(Error::new(error.kind(), error.to_string()))
                } else if by_footer {
                    self.confirms(hash, place)
                } else {
                    self.proves(hash, place, decoder.get_or_insert_with(|| self.take_decoder()))
                };
                is_gone = answers[*claim].as_ref().is_err_and(|error| error.kind() == Kind::NotFound);
            }
        }
        if let Some(decoder) = decoder {
            lock(&self.decoders).push(decoder);
        }
        answers
    }

    /// Whether the store has these objects will be asked soon: where it is far away, it is asked of all at once.
    pub fn look_for(&self, objects: &[ObjectRef]) {
        drop(self.ask_for(objects.iter()));
    }

    /// Whether the store has those of these objects of which that is not known, where it is far away: all are asked for at once.
    fn ask_for<'a>(&self, objects: impl Iterator<Item = &'a ObjectRef>) -> HashMap<&'a ObjectRef, Result<bool>> {
        if !self.store.is_remote() {
            return HashMap::new();
        }
        let unknown: Vec<&ObjectRef> = objects.filter(|object| lock(&self.existing).get(object).is_none()).collect();
        let told = at_once(true, &unknown, &|object| match self.exists(object) {
            Err(error) if !error.kind().is_of_object() => Err(error),
            told => Ok(told),
        });
        match told {
            Ok(told) => unknown.into_iter().zip(told).collect(),
            // Who is not answered waits once, and not for each.
            Err(error) => {
                let failed = |object| (object, Err(Error::new(error.kind(), error.to_string())));
                unknown.into_iter().map(failed).collect()
            }
        }
    }

    /// Whether the store has this object still, and a record with the blocks that lay in it. Bytes that were kept here of an
    /// object that is far away may outlive it, and a collector on another host may have deleted it; a store that is near is
    /// asked by reading.
    fn exists(&self, object: &ObjectRef) -> Result<bool> {
        let is_kept_here = || self.store.is_remote() || self.store.cache().is_some();
        if !is_kept_here() {
            return Ok(true);
        }
        if lock(&self.existing).get(object).is_some() {
            return Ok(true);
        }
        let forgets = self.forgets.load(Ordering::Acquire);
        let exists = match (object, self.store.len(&object_key(object))?) {
            (_, None) => false,
            (ObjectRef::Pack(_), Some(_)) => true,
            (ObjectRef::Record { .. }, Some(len)) => self.footer(object)?.object_len() == len,
        };
        let mut existing = lock(&self.existing);
        if exists && self.forgets.load(Ordering::Acquire) == forgets {
            existing.insert(object.clone(), (), EXISTING_WEIGHT);
        }
        Ok(exists)
    }

    fn take_decoder(&self) -> PageDecoder {
        lock(&self.decoders).pop().unwrap_or_default()
    }

    /// Whether the block at this place is a page with this hash.
    fn proves(&self, hash: &Hash, place: &Place, decoder: &mut PageDecoder) -> Result<bool> {
        match self.store.get_range(&object_key(&place.object), place.range()) {
            Ok(block) => Ok(decoder.decode(&block, hash, &mut [0; PAGE_SIZE]).is_ok()),
            Err(error) => Err(error),
        }
    }

    /// Whether a page with this hash begins at this place, by the footer of the object.
    fn confirms(&self, hash: &Hash, place: &Place) -> Result<bool> {
        let footer = self.footer(&place.object)?;
        if is_record(&place.object) && footer.len() == 1 {
            return Err(Error::not_found(format!("there are no blocks in {}", object_key(&place.object))));
        }
        let entry = footer.find(place.offset);
        Ok(entry.is_some_and(|entry| entry.hash == *hash && entry.len == place.len && entry.kind == BlockKind::Page))
    }
}

fn is_record(object: &ObjectRef) -> bool {
    matches!(object, ObjectRef::Record { .. })
}

/// A record's object without any block but the record's own.
pub fn bare_record(repository: &[u8; 16], object: &ObjectRef, block: &[u8]) -> Vec<u8> {
    let mut footer = FooterBuilder::new();
    footer.push(BlockKind::Record, [0; 32], u32::try_from(block.len()).expect("a block is shorter than 16 MiB"));
    let mut bytes = encode_header(repository, object).to_vec();
    bytes.extend_from_slice(block);
    bytes.extend_from_slice(&footer.finish());
    bytes
}

fn missing_is_damage(error: Error) -> Error {
    match error.kind() {
        Kind::NotFound => Error::damaged(error.to_string())
            .hint("an object that epochs refer to is missing; `epochfs verify` lists what is affected"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::files::RealFiles;
    use crate::platform::store::{CacheSettings, CachedStore, LocalStore};

    #[test]
    fn p4_that_a_pack_was_there_is_forgotten_when_it_is_heard_of_a_collection() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let inner: Arc<dyn Store> = Arc::new(LocalStore::create(&path("store"), Arc::new(RealFiles)).unwrap());
        let cached = CachedStore::new(inner.clone(), CacheSettings { directory: path("cache"), len_max: 1 << 30 });
        let objects = Objects::new(Arc::new(cached), [0; 16]);
        for forget in [&|pack: &ObjectRef| objects.forget(pack), &|_: &ObjectRef| objects.forget_all()]
            as [&dyn Fn(&ObjectRef); 2]
        {
            let pack = ObjectRef::Pack([1; 16]);
            inner.put_if_absent(&object_key(&pack), &[b"a pack"]).unwrap();
            assert!(objects.exists(&pack).unwrap());
            inner.delete(&object_key(&pack)).unwrap();
            assert!(objects.exists(&pack).unwrap(), "the store is not asked each time");
            forget(&pack);
            assert!(!objects.exists(&pack).unwrap());
        }
    }
}
