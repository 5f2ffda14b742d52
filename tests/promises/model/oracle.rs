//! What a repository must hold, kept as plainly as possible.

use std::collections::BTreeMap;

use epochfs::platform::random::Seeded;

use crate::support::Streams;
use crate::support::image::{Image, LEAF, PAGE, noise, some_page};

/// A machine's log, by what came of it.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    pub exists: bool,
    /// The number of its newest record.
    pub newest: u64,
    pub epochs: BTreeMap<u64, Streams>,
    pub tags: BTreeMap<String, u64>,
    /// Numbers that name no epoch: dropped ones, and other records.
    pub gone: Vec<u64>,
}

impl Machine {
    pub fn latest(&self) -> u64 {
        self.epochs.keys().next_back().copied().unwrap_or(0)
    }

    /// Counts a record that is no epoch.
    pub fn edit(&mut self) {
        self.newest += 1;
        self.gone.push(self.newest);
    }

    pub fn drop_epoch(&mut self, epoch: u64) {
        self.epochs.remove(&epoch);
        self.tags.retain(|_, tagged| *tagged != epoch);
        self.gone.push(epoch);
    }
}

pub const MACHINES: [&str; 5] = ["web1", "db", "a b", "ü%41", "x=y"];
pub const TAGS: [&str; 4] = ["golden", "before-upgrade", "7a", "schön"];

pub fn stream_names() -> Vec<Vec<u8>> {
    vec![
        b"memory".to_vec(),
        b"disk0".to_vec(),
        b"vmstate".to_vec(),
        b"dir/sub/file".to_vec(),
        b"new\nline".to_vec(),
        b"\xff\xfe\x80".to_vec(),
        b"a=b\\ c".to_vec(),
        vec![b'n'; 255],
    ]
}

pub fn pick<'a, T>(seeded: &mut Seeded, from: &'a [T]) -> Option<&'a T> {
    (!from.is_empty()).then(|| &from[seeded.below(from.len() as u64) as usize])
}

/// Lengths at which something changes: pages, leaves, levels of the tree.
pub fn some_length(seeded: &mut Seeded) -> u64 {
    const SPECIAL: [u64; 24] = [
        0,
        1,
        PAGE - 1,
        PAGE,
        PAGE + 1,
        2 * PAGE,
        LEAF - PAGE,
        LEAF - 1,
        LEAF,
        LEAF + 1,
        LEAF + PAGE,
        2 * LEAF,
        2 * LEAF + 5,
        3 * LEAF - 1,
        (1 << 30) - 1,
        1 << 30,
        (1 << 30) + 1,
        (1 << 39) - PAGE,
        1 << 39,
        (1 << 39) + 1,
        1 << 44,
        (1 << 44) - 4097,
        (1 << 44) + 1,
        (1 << 48) + 12_345,
    ];
    match seeded.below(5) {
        0 => seeded.below(40 * PAGE),
        1 => seeded.below(4 * LEAF),
        2 => SPECIAL[seeded.below(6) as usize],
        3 => SPECIAL[seeded.below(14) as usize],
        _ => SPECIAL[seeded.below(24) as usize],
    }
}

/// A page of the image, more often than not at the edge of something.
pub fn some_position(seeded: &mut Seeded, image: &Image) -> u64 {
    let last = image.length.saturating_sub(1) / PAGE;
    match seeded.below(6) {
        0 => 0,
        1 => last,
        2 => (seeded.below(3) * 512 + 511 + seeded.below(2)).min(last),
        3 => (1_u64 << (9 * seeded.below(4))).saturating_sub(seeded.below(2)).min(last),
        4 => seeded.below(20).min(last),
        _ => seeded.below(last + 1),
    }
}

/// Changes an image as a guest would.
pub fn mutate(seeded: &mut Seeded, image: &mut Image) {
    if seeded.chance(250) {
        image.resize(some_length(seeded));
    }
    if image.length == 0 {
        return;
    }
    for _ in 0..[0, 1, 1, 2, 5, 12][seeded.below(6) as usize] {
        let number = some_position(seeded, image);
        match seeded.below(8) {
            0 => image.put_page(number, [0; PAGE as usize]),
            1 => {
                let start = number * PAGE + seeded.below(PAGE);
                let mut bytes = vec![0; seeded.below(3 * PAGE).min(image.length.saturating_sub(start)) as usize];
                noise(seeded, &mut bytes);
                if start < image.length {
                    image.write(start, &bytes);
                }
            }
            2 => {
                // A page that lies elsewhere in the image already.
                let numbers: Vec<u64> = image.page_numbers().take(50).collect();
                if let Some(from) = pick(seeded, &numbers) {
                    image.put_page(number, image.page(*from));
                }
            }
            3 if seeded.chance(150) => {
                // A whole stretch, across leaves.
                let kind = seeded.below(3);
                for page in number..(number + seeded.below(700)).min(image.length.div_ceil(PAGE)) {
                    let mut bytes = [kind as u8; PAGE as usize];
                    if kind == 2 {
                        bytes[..8].copy_from_slice(&page.to_le_bytes());
                    }
                    image.put_page(page, bytes);
                }
            }
            _ => image.put_page(number, some_page(seeded)),
        }
    }
}
