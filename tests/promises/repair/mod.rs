//! P5, P2: whatever is damaged comes back byte for byte where there is another copy of it, and never as anything else; what
//! has none is left as it is, and no later commit leans on it.

mod crashes;
mod elsewhere;
mod hostile;
mod quarantine;

use bytes::Bytes;
use epochfs::epoch::{EpochStore, RepairSources, Repaired};
use epochfs_format::{Footer, TRAILER_LEN, Trailer, record_seq};

use crate::flips::repository::{Sample, for_each, sample};
use crate::must;
use crate::support::memory::{MemoryStore, ObjectMap};
use crate::support::{Check, Saying, open};

/// Where other copies may be: repositories that hold these objects.
pub fn sources(from: &[ObjectMap]) -> RepairSources {
    let from = from.iter().map(|objects| open(MemoryStore::of(objects.clone())).unwrap()).collect();
    RepairSources { from, cache: None }
}

pub fn repair(store: &EpochStore, sources: &RepairSources) -> epochfs::Result<Repaired> {
    store.repair(sources, true, &mut |_, _| {})
}

/// Repairs these objects, and returns what they have become.
pub fn repaired(objects: ObjectMap, from: &[ObjectMap]) -> epochfs::Result<(ObjectMap, Repaired)> {
    let memory = MemoryStore::of(objects);
    let repaired = repair(&open(memory.clone())?, &sources(from))?;
    Ok((memory.objects(), repaired))
}

/// The objects without those that come and go.
pub fn lasting(objects: &ObjectMap) -> ObjectMap {
    let comes_and_goes = |key: &str| key.starts_with("gc/readers/") || key.starts_with("quarantine/");
    objects.iter().filter(|(key, _)| !comes_and_goes(key)).map(|(key, bytes)| (key.clone(), bytes.clone())).collect()
}

/// Whether each object is what it was at first, or what it was before the repair; or each of its blocks is.
pub fn judge(first: &ObjectMap, before: &ObjectMap, after: &ObjectMap) -> Check {
    for (key, bytes) in &lasting(after) {
        let is_first = first.get(key) == Some(bytes);
        if is_first || before.get(key) == Some(bytes) {
            continue;
        }
        let (Some(first), Some(before)) = (first.get(key), before.get(key)) else {
            return Err(format!("{key} is neither what it was nor left as it was"));
        };
        must!(first.len() == before.len() && first.len() == bytes.len(), "{key} has a length that it never had");
        for (part, range) in parts(first) {
            let is_sound = [first, before].iter().any(|sound| sound[range.clone()] == bytes[range.clone()]);
            must!(is_sound, "the {part} at {} of {key} is neither what it was nor left as it was", range.start);
        }
    }
    for key in lasting(before).keys() {
        must!(after.contains_key(key), "{key} is gone");
    }
    Ok(())
}

/// Whether a repair with a sound copy at hand brought everything back.
fn judge_all_back(first: &ObjectMap, after: &ObjectMap, repaired: &Repaired) -> Check {
    let (first, after) = (lasting(first), lasting(after));
    let wrong: Vec<&String> =
        first.iter().filter(|(key, bytes)| after.get(*key) != Some(bytes)).map(|(key, _)| key).collect();
    must!(wrong.is_empty(), "{wrong:?} did not come back: {:?}", repaired.lost);
    must!(after.len() == first.len(), "there are other objects than before");
    must!(repaired.left.is_whole(), "it says that damage is left: {:?}", repaired.left.problems);
    must!(repaired.quarantined_blocks == 0, "what is whole is quarantined");
    Ok(())
}

pub fn footer(bytes: &[u8]) -> (Trailer, Footer) {
    let trailer = Trailer::decode(bytes, bytes.len() as u64).unwrap();
    let footer = trailer.decode_footer(&bytes[trailer.footer_offset as usize..bytes.len() - TRAILER_LEN]).unwrap();
    (trailer, footer)
}

/// What an object is made of.
fn parts(bytes: &[u8]) -> Vec<(String, std::ops::Range<usize>)> {
    let (trailer, footer) = footer(bytes);
    let footer_offset = trailer.footer_offset as usize;
    let mut parts = vec![("header".to_owned(), 0..64)];
    parts.extend(footer.iter().map(|entry| {
        let start = entry.offset as usize;
        (format!("{:?}", entry.kind), start..start + entry.len as usize)
    }));
    parts.push(("footer".to_owned(), footer_offset..bytes.len() - TRAILER_LEN));
    parts.push(("trailer".to_owned(), bytes.len() - TRAILER_LEN..bytes.len()));
    parts
}

/// An object with damage of every kind in every part: header, each block, footer, trailer.
pub fn damaged(bytes: &Bytes) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for (part, range) in parts(bytes) {
        let middle = (range.start + range.end) / 2;
        let mut spoil = |how: &str, range: std::ops::Range<usize>, by: &dyn Fn(u8) -> u8| {
            let mut wrong = bytes.to_vec();
            wrong[range].iter_mut().for_each(|byte| *byte = by(*byte));
            if wrong != bytes[..] {
                all.push((format!("{how} the {part}"), wrong));
            }
        };
        spoil("a flipped bit in", middle..middle + 1, &|byte| byte ^ 0x20);
        spoil("a few wrong bytes in", middle..(middle + 5).min(range.end), &|byte| !byte);
        spoil("wrong bytes at the beginning of", range.start..range.start + 4, &|byte| !byte);
        spoil("zeros instead of", range.clone(), &|_| 0);
    }
    all
}

fn objects_with_blocks(sample: &Sample) -> impl Iterator<Item = &String> {
    sample.objects.keys().filter(|key| key.starts_with("packs/") || key.contains("/log/"))
}

/// Nobody can tell from a log that its newest record is missing.
fn is_newest(sample: &Sample, key: &str) -> bool {
    let next = record_seq(key).map(|seq| key.replace(&format!("{seq:016}"), &format!("{:016}", seq + 1)));
    next.is_some_and(|next| !sample.objects.contains_key(&next))
}

#[test]
fn p5_damage_in_every_part_of_every_object_is_repaired_from_a_copy_of_the_repository() {
    let sample = sample();
    let mut cases: Vec<(&String, String, Option<Vec<u8>>)> = Vec::new();
    for key in objects_with_blocks(&sample) {
        let bytes = &sample.objects[key];
        cases.extend(damaged(bytes).into_iter().map(|(what, wrong)| (key, what, Some(wrong))));
        for len in [0, 10, bytes.len() / 2, bytes.len() - 40, bytes.len() - 1] {
            cases.push((key, format!("{len} bytes of it"), Some(bytes[..len].to_vec())));
        }
        cases.push((key, "more behind it".to_owned(), Some([&bytes[..], &[7; 100]].concat())));
        let other = objects_with_blocks(&sample).find(|other| *other != key).unwrap();
        cases.push((key, "another object instead".to_owned(), Some(sample.objects[other].to_vec())));
        cases.push((key, "nothing".to_owned(), None));
    }
    for_each(&cases, |(key, what, wrong)| {
        let mut objects = sample.objects.clone();
        match wrong {
            Some(wrong) => drop(objects.insert((*key).clone(), wrong.clone().into())),
            None => drop(objects.remove(*key)),
        }
        let (after, repaired) = repaired(objects.clone(), std::slice::from_ref(&sample.objects)).unwrap();
        judge(&sample.objects, &objects, &after).unwrap_or_else(|wrong| panic!("{what} of {key}: {wrong}"));
        let back = judge_all_back(&sample.objects, &after, &repaired);
        // Of a newest record nothing but itself tells what it was.
        if back.is_err() && is_newest(&sample, key) {
            return;
        }
        back.unwrap_or_else(|wrong| panic!("{what} of {key}: {wrong}"));
    });
    eprintln!("{} repairs", cases.len());
}

/// Without any other copy: a single flipped bit is found by the checksum and the hash, and what headers, footers and
/// trailers say is known from the rest.
#[test]
fn p5_a_flipped_bit_is_repaired_without_any_other_copy_and_nothing_is_made_up() {
    let sample = sample();
    let mut cases: Vec<(&String, String, Vec<u8>)> = Vec::new();
    for key in objects_with_blocks(&sample) {
        cases.extend(damaged(&sample.objects[key]).into_iter().map(|(what, wrong)| (key, what, wrong)));
    }
    let unrepaired = std::sync::Mutex::new(Vec::new());
    for_each(&cases, |(key, what, wrong)| {
        let mut objects = sample.objects.clone();
        objects.insert((*key).clone(), wrong.clone().into());
        let (after, repaired) = repaired(objects.clone(), &[]).unwrap();
        judge(&sample.objects, &objects, &after).unwrap_or_else(|wrong| panic!("{what} of {key}: {wrong}"));
        let is_back = judge_all_back(&sample.objects, &after, &repaired);
        if is_back.is_err() {
            let is_silent = repaired.left.is_whole();
            assert!(!is_silent, "{what} of {key}: it was not repaired, and it is said to be whole");
            unrepaired.lock().unwrap().push(format!("{what} of {key}"));
            let must_work = what.starts_with("a flipped bit") && !(what.ends_with("Record") && is_newest(&sample, key));
            assert!(!must_work, "{what} of {key}: {is_back:?}");
            let of_form = ["header", "footer", "trailer"].iter().any(|part| what.ends_with(part));
            assert!(!of_form, "{what} of {key}: {is_back:?}");
        }
    });
    eprintln!("{} of {} were not repaired, and told", unrepaired.lock().unwrap().len(), cases.len());
}

/// What is wrong with summaries is mended by the log.
#[test]
fn p5_damaged_summaries_are_made_again() {
    let memory = MemoryStore::default();
    let store = crate::support::create(memory.clone());
    let image = crate::crash::noisy_image(3, 2);
    for _ in 0..33 {
        crate::support::commit(&store, "web1", &crate::support::memory(&image), crate::support::options()).unwrap();
    }
    let first = memory.objects();
    let summaries: Vec<&String> = first.keys().filter(|key| key.contains("/summaries/")).collect();
    assert!(summaries.len() >= 2, "{summaries:?}");
    for key in &summaries {
        for other in [first[*key].slice(..20), first[summaries[0]].clone(), Bytes::from_static(b"")] {
            let mut objects = first.clone();
            objects.insert((*key).clone(), other);
            let (after, repaired) = repaired(objects, &[]).unwrap();
            judge_all_back(&first, &after, &repaired).saying(key).unwrap();
        }
    }
}

/// Looking alone changes nothing, and says what would be done.
#[test]
fn without_being_told_to_nothing_is_changed() {
    let sample = sample();
    let key = objects_with_blocks(&sample).next().unwrap();
    for (what, wrong) in damaged(&sample.objects[key]) {
        let mut objects = sample.objects.clone();
        objects.insert(key.clone(), wrong.into());
        let memory = MemoryStore::of(objects.clone());
        let sources = sources(std::slice::from_ref(&sample.objects));
        let repaired = open(memory.clone()).unwrap().repair(&sources, false, &mut |_, _| {}).unwrap();
        assert!(!repaired.is_applied && !repaired.left.is_whole(), "{what}");
        assert!(!repaired.repaired_blocks.is_empty() || !repaired.lost.is_empty(), "{what}");
        assert_eq!(lasting(&memory.objects()), lasting(&objects), "{what}");
    }
}

/// The judges notice an object that was made up, one that is gone, one that did not come back, and a repair that calls
/// whole what is not.
#[test]
fn canary_p5_the_judge_notices_what_a_bad_repair_would_do() {
    let sample = sample();
    let key = objects_with_blocks(&sample).next().unwrap().clone();
    let mut before = sample.objects.clone();
    before.insert(key.clone(), damaged(&sample.objects[&key])[0].1.clone().into());
    let (after, repaired) = repaired(before.clone(), std::slice::from_ref(&sample.objects)).unwrap();
    judge(&sample.objects, &before, &after).unwrap();
    judge_all_back(&sample.objects, &after, &repaired).unwrap();
    let spoilt: [&dyn Fn(&mut ObjectMap); 3] = [
        &|after| drop(after.insert(key.clone(), [&after[&key][..], &[0]].concat().into())),
        &|after| drop(after.insert(key.clone(), vec![0; after[&key].len()].into())),
        &|after| drop(after.remove(&key)),
    ];
    for (number, spoil) in spoilt.iter().enumerate() {
        let mut wrong = after.clone();
        spoil(&mut wrong);
        assert!(judge(&sample.objects, &before, &wrong).is_err(), "spoilt in way {number}, it passes");
        assert!(judge_all_back(&sample.objects, &wrong, &repaired).is_err(), "spoilt in way {number}, it passes");
    }
    assert!(judge_all_back(&sample.objects, &before, &repaired).is_err());
    let mut lied = repaired.clone();
    lied.left = lied.found.clone();
    assert!(judge_all_back(&sample.objects, &after, &lied).is_err());
}
