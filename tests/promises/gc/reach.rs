//! What is reachable, as naively as can be: every record of every log, every node of every tree. Shares nothing with the
//! collector but the format.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use epochfs::epoch::commit_of;
use epochfs::platform::store::Store;
use epochfs::repo::{Repository, machines, object_key};
use epochfs_format::{
    Image, ManifestPlace, ObjectRef, PAGE_SIZE, PageDecoder, Place, Record, StoredNode, decode_node, levels_for,
};

use crate::support::memory::MemoryStore;
use crate::support::{Check, Saying};

/// Every object that an existing epoch needs, or one of these, with the epoch that does. Objects that are missing are
/// told.
pub fn reachable(objects: &MemoryStore, held: &[(Arc<str>, u64)]) -> Check<BTreeMap<String, String>> {
    let repository = Repository::open(Arc::new(objects.clone())).saying("opening")?;
    // As whoever has the key sees them.
    let store = &**repository.objects().store();
    let mut needed = BTreeMap::new();
    let mut seen = HashSet::new();
    for machine in machines(repository.objects()).saying("listing")? {
        let Some(head) = repository.log_head(&machine).saying(&machine)? else { continue };
        let state = repository.state(&head, &mut |_, _| {}).saying(&machine)?;
        for record in state.epochs.values() {
            add(store, record, &mut needed, &mut seen)?;
        }
    }
    for (machine, epoch) in held {
        let (record, _) =
            repository.objects().record(machine, *epoch).saying(machine)?.ok_or("a held record is gone")?;
        add(store, &record, &mut needed, &mut seen).saying("held by a reader")?;
    }
    Ok(needed)
}

/// The packs that are there.
pub fn packs(objects: &MemoryStore) -> BTreeSet<String> {
    objects.objects().into_keys().filter(|key| key.starts_with("packs/")).collect()
}

/// The records in which blocks lie.
pub fn carrying(objects: &MemoryStore) -> Check<BTreeSet<String>> {
    let repository = Repository::open(Arc::new(objects.clone())).saying("opening")?;
    let objects = repository.objects();
    let mut carrying = BTreeSet::new();
    for machine in machines(objects).saying("listing")? {
        for seq in 1.. {
            let object = ObjectRef::Record { machine: machine.clone(), seq };
            if objects.record(&machine, seq).saying(&machine)?.is_none() {
                break;
            }
            let blocks = objects.footer(&object).saying("its footer")?;
            carrying.extend((blocks.len() > 1).then(|| object_key(&object)));
        }
    }
    Ok(carrying)
}

fn add(
    objects: &dyn Store,
    record: &Record,
    needed: &mut BTreeMap<String, String>,
    seen: &mut HashSet<Place>,
) -> Check {
    let name = format!("{}@{}", record.machine, record.seq);
    let commit = commit_of(record).saying(&name)?;
    let mut images: Vec<Image> = Vec::new();
    match &commit.manifest {
        ManifestPlace::Inline(manifest) => images.extend(manifest.streams().map(|(_, image)| image.clone())),
        ManifestPlace::Image(_) => return Err(format!("{name}: the simulation makes no large manifests")),
    }
    for image in images {
        let Some(root) = image.root else { continue };
        add_node(objects, &root.place, levels_for(image.length) - 1, &name, needed, seen).saying(&name)?;
    }
    Ok(())
}

fn read(objects: &dyn Store, place: &Place) -> Check<Vec<u8>> {
    let range = u64::from(place.offset)..u64::from(place.offset) + u64::from(place.len);
    Ok(objects.get_range(&object_key(&place.object), range).map_err(|error| error.to_string())?.to_vec())
}

fn need(objects: &dyn Store, object: &ObjectRef, by: &str, needed: &mut BTreeMap<String, String>) -> Check {
    let key = object_key(object);
    if objects.len(&key).saying(&key)?.is_none() {
        return Err(format!("{key} is missing"));
    }
    needed.entry(key).or_insert_with(|| by.to_owned());
    Ok(())
}

fn add_node(
    objects: &dyn Store,
    place: &Place,
    level: u8,
    by: &str,
    needed: &mut BTreeMap<String, String>,
    seen: &mut HashSet<Place>,
) -> Check {
    if !seen.insert(place.clone()) {
        return Ok(());
    }
    need(objects, &place.object, by, needed)?;
    let node = match decode_node(&read(objects, place)?, &place.object).saying("decoding")? {
        StoredNode::Whole(node) => node,
        StoredNode::Patch(patch) => {
            need(objects, &patch.base.object, by, needed)?;
            let base = decode_node(&read(objects, &patch.base)?, &patch.base.object).saying("decoding a base")?;
            let StoredNode::Whole(base) = base else { return Err("a patch of a patch".into()) };
            patch.apply(&base).saying("applying a patch")?
        }
    };
    for slot in node.iter() {
        if level == 0 {
            need(objects, slot.object, by, needed)?;
            // That the record is there says nothing about the blocks in it.
            if matches!(slot.object, ObjectRef::Record { .. }) && seen.insert(slot.place()) {
                let block = read(objects, &slot.place())?;
                PageDecoder::new().decode(&block, slot.hash, &mut [0; PAGE_SIZE]).saying("decoding a page")?;
            }
        } else {
            add_node(objects, &slot.place(), level - 1, by, needed, seen)?;
        }
    }
    Ok(())
}
