//! Where other copies are: the same object elsewhere, byte for byte; and blocks of other objects with the same content.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use epochfs_format::{BlockKind, Hash, ObjectRef, PageDecoder, Place};

use super::RepairSources;
use super::blocks::{From, node_at};
use super::object::damaged_entries;
use crate::epoch::verify::Damage;
use crate::epoch::view::EpochStore;
use crate::error::Result;
use crate::platform::store::{KeptStore, Store};
use crate::repo::{Objects, object_key, objects_of};

/// So many places of one page are remembered: one of them will be sound.
const PLACES_MAX: usize = 8;

/// A copy of the repository's own objects.
enum Exact<'a> {
    Repository(&'a Arc<Objects>),
    /// What this host read or wrote.
    Kept(Arc<dyn Store>),
}

/// A repository whose blocks may have the content that is wanted.
struct Blocks<'a> {
    name: From,
    store: &'a EpochStore,
    places: HashMap<Hash, Vec<Place>>,
}

/// All of them.
pub struct Donors<'a> {
    exact: Vec<(From, Exact<'a>)>,
    /// The damaged repository itself is the first.
    blocks: Vec<Blocks<'a>>,
    damage: &'a Damage,
}

impl<'a> Donors<'a> {
    pub fn new(own: &'a EpochStore, sources: &'a RepairSources, damage: &'a Damage) -> Self {
        let mut exact = Vec::new();
        if let Some(cache) = &sources.cache {
            let kept = own.repository().see(Arc::new(KeptStore::new(cache.clone())));
            exact.push(("this host's cache".into(), Exact::Kept(kept)));
        }
        let blocks = |name: String, store: &'a EpochStore| Blocks { name: name.into(), store, places: HashMap::new() };
        let mut all = vec![blocks("another place in the repository".into(), own)];
        for from in &sources.from {
            let url = from.repository().url();
            if from.repository().id() == own.repository().id() {
                exact.push((url.as_str().into(), Exact::Repository(from.repository().objects())));
            }
            all.push(blocks(url, from));
        }
        Self { exact, blocks: all, damage }
    }

    /// The objects of the damaged repository.
    pub fn own(&self) -> &'a Arc<Objects> {
        self.blocks[0].store.repository().objects()
    }

    /// Whether an epoch that can be followed needs the object.
    pub fn is_needed(&self, object: &ObjectRef) -> bool {
        self.damage.needed.contains_key(object)
    }

    /// Looks for all blocks whose content is that of a damaged block of these objects; and for what nodes that have to be
    /// made again refer to.
    pub fn look_for(&mut self, objects: &BTreeSet<ObjectRef>, decoder: &mut PageDecoder) -> Result<()> {
        let (mut wanted, mut nodes) = (HashSet::new(), HashSet::new());
        for object in objects {
            for entry in damaged_entries(object, self, decoder)? {
                if entry.kind != BlockKind::Record {
                    wanted.insert(entry.hash);
                }
                if matches!(entry.kind, BlockKind::Node | BlockKind::Patch) {
                    nodes.insert(entry.hash);
                }
            }
        }
        for at in 0..self.blocks.len() {
            self.scan(at, &wanted)?;
        }
        let below: HashSet<Hash> = nodes
            .iter()
            .filter_map(|digest| self.node(digest))
            .flat_map(|(node, _)| node.iter().map(|slot| *slot.hash).collect::<Vec<_>>())
            .collect();
        self.scan(0, &below)
    }

    /// Looks through the footers of one repository.
    fn scan(&mut self, at: usize, wanted: &HashSet<Hash>) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let damage = self.damage;
        let Blocks { store, places, .. } = &mut self.blocks[at];
        let objects = store.repository().objects();
        for object in objects_of(objects)? {
            let footer = match objects.footer(&object) {
                Ok(footer) => footer,
                Err(error) if error.kind().is_of_object() => continue,
                Err(error) => return Err(error),
            };
            for entry in footer.iter().filter(|entry| wanted.contains(&entry.hash)) {
                let is_damaged = at == 0 && damage.is_bad(&object, (entry.offset, entry.len));
                let known = places.entry(entry.hash).or_default();
                // What a node refers to is looked for though it be damaged itself: the node is to be what it was.
                let place = Place { object: object.clone(), offset: entry.offset, len: entry.len };
                if known.contains(&place) {
                    continue;
                }
                if is_damaged {
                    known.push(place);
                } else {
                    known.insert(0, place);
                }
                known.truncate(PLACES_MAX);
            }
        }
        Ok(())
    }

    /// These bytes of the same object, elsewhere. With each, whether it is what this host itself read or wrote.
    pub fn same_range(&self, object: &ObjectRef, range: &Range<u64>) -> impl Iterator<Item = (From, Bytes, bool)> {
        let key = object_key(object);
        self.exact.iter().filter_map(move |(name, exact)| {
            let (bytes, is_own) = match exact {
                Exact::Repository(objects) => (objects.store().get_range(&key, range.clone()).ok()?, false),
                Exact::Kept(kept) => (kept.get_range(&key, range.clone()).ok()?, true),
            };
            Some((name.clone(), bytes, is_own))
        })
    }

    /// All of the same object, elsewhere.
    pub fn same_object(&self, object: &ObjectRef) -> impl Iterator<Item = (From, Bytes, bool)> {
        let key = object_key(object);
        self.exact.iter().filter_map(move |(name, exact)| {
            let (bytes, is_own) = match exact {
                Exact::Repository(objects) => (objects.store().get(&key).ok()?, false),
                Exact::Kept(kept) => (kept.get(&key).ok()?, true),
            };
            Some((name.clone(), bytes, is_own))
        })
    }

    /// Where blocks of this content lie.
    pub fn places(&self, hash: &Hash) -> impl Iterator<Item = (From, &'a Arc<Objects>, &Place)> {
        self.blocks.iter().flat_map(move |blocks| {
            let places = blocks.places.get(hash).into_iter().flatten();
            places.map(|place| (blocks.name.clone(), blocks.store.repository().objects(), place))
        })
    }

    /// Where blocks of this content lie in the damaged repository.
    pub fn own_places(&self, hash: &Hash) -> &[Place] {
        self.blocks[0].places.get(hash).map_or(&[], Vec::as_slice)
    }

    /// A node with this digest, wherever it lies.
    pub fn node(&self, digest: &Hash) -> Option<(epochfs_format::Node, From)> {
        self.places(digest).find_map(|(name, objects, place)| Some((node_at(objects, place, digest)?, name)))
    }
}
