//! Room that a collector always has: commits stop before the disk is full, and a reserve is kept for when something else
//! fills it.

use std::time::Duration;

use epochfs_format::RESERVE_KEY;

use super::repository::Repository;
use crate::error::{Error, Kind, Result};
use crate::platform::files::Room;
use crate::platform::random::Seeded;
use crate::platform::store::Put;

/// Commits leave so much free, or a 64th of a smaller disk, or nothing of one that is smaller than this.
const LOW_WATER: u64 = 256 << 20;
const SMALL_DISK: u64 = 1 << 30;

/// The reserve takes so much, or a 64th of a smaller disk.
const RESERVE: u64 = 4 << 20;

/// How often, and how long after each other, what gives room back is tried again once the reserve was given up.
const RETRIES: u32 = 5;
const RETRY_PAUSE: Duration = Duration::from_millis(50);

fn part_of(room: &Room, at_most: u64) -> u64 {
    at_most.min(room.total / 64)
}

fn low_water(room: &Room) -> u64 {
    if room.total < SMALL_DISK { 0 } else { part_of(room, LOW_WATER) }
}

impl Repository {
    /// How much commits may still take, where the store has an end.
    pub fn room_left(&self) -> Option<u64> {
        self.objects().store().room().map(|room| room.free.saturating_sub(low_water(&room)))
    }

    /// Refuses where so little room is left that only giving some back should take it.
    pub fn check_room(&self) -> Result<()> {
        let store = self.objects().store();
        let Some(room) = store.room() else { return Ok(()) };
        let low_water = low_water(&room);
        if room.free < low_water {
            let (free, kept) = (room.free >> 20, low_water >> 20);
            return Err(Error::new(
                Kind::NoSpace,
                format!("{} has {free} MiB left, and commits leave {kept} MiB free", store.url()),
            )
            .hint("give room back: epochfs prune or rm, then epochfs gc run --yes"));
        }
        self.keep_reserve();
        Ok(())
    }

    /// Makes sure of the reserve where room is getting low, and there is still some for it.
    pub fn keep_reserve(&self) {
        let store = self.objects().store();
        let Some(room) = store.room() else { return };
        let len = part_of(&room, RESERVE);
        // A small disk is full before it was ever seen to be low: what else lies there comes and goes.
        let is_low = room.total < SMALL_DISK || room.free < (4 * low_water(&room)).max(SMALL_DISK / 4);
        if !is_low || room.free < 2 * len || !matches!(store.len(RESERVE_KEY), Ok(None)) {
            return;
        }
        // Not zeros: a file system that compresses would reserve nothing.
        let mut seeded = Seeded::new(len);
        let bytes: Vec<u8> = (0..len / 8).flat_map(|_| seeded.next().to_le_bytes()).collect();
        match store.put_if_absent(RESERVE_KEY, &[&bytes]) {
            Ok(Put::Created | Put::Exists) => {}
            Err(error) => tracing::debug!("there is no reserve: {error}"),
        }
    }

    /// Does what gives room back, on a full disk with the help of the reserve.
    pub fn with_reserve<T>(&self, work: &mut dyn FnMut() -> Result<T>) -> Result<T> {
        match work() {
            Err(error) if error.kind() == Kind::NoSpace => {
                let store = self.objects().store();
                if store.len(RESERVE_KEY)?.is_none() {
                    return Err(error);
                }
                tracing::info!("the disk is full: the reserve is used");
                store.delete(RESERVE_KEY)?;
                // Who allocates more than there is (a file system that tries, a database's log) takes all for a moment.
                for _ in 0..RETRIES {
                    match work() {
                        Err(error) if error.kind() == Kind::NoSpace => std::thread::sleep(RETRY_PAUSE),
                        result => return result,
                    }
                }
                work()
            }
            result => result,
        }
    }
}
