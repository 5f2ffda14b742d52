//! What the kernel says through a userfaultfd: messages of 32 bytes.

use std::ops::Range;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A thread waits for the page that holds this address.
    Fault(u64),
    /// A thread waits to write to the page that holds this address, which is protected.
    Protected(u64),
    /// The process gave this range up: what is touched there again is zeros.
    Removed(Range<u64>),
    /// The process took the mapping itself away.
    Unmapped(Range<u64>),
    /// One that cannot be served: a fork, a mapping that moves, a fault of another kind.
    Foreign(&'static str),
}

const FAULT: u8 = 0x12;
const FORK: u8 = 0x13;
const REMAP: u8 = 0x14;
const REMOVE: u8 = 0x15;
const UNMAP: u8 = 0x16;

/// A fault on a page that is there, by write protection.
const OF_PROTECTION: u64 = 2;

/// A fault on a page that is there, in memory that others share.
const OF_SHARED_PAGE: u64 = 4;

impl Message {
    /// Nothing where no message is: the kernel numbers none with zero.
    pub fn decode(bytes: &[u8; 32]) -> Option<Self> {
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Some(match bytes[0] {
            0 => return None,
            FAULT if word(8) & OF_PROTECTION != 0 => Self::Protected(word(16)),
            FAULT if word(8) & OF_SHARED_PAGE != 0 => Self::Foreign("a fault on a page that is there"),
            FAULT => Self::Fault(word(16)),
            REMOVE => Self::Removed(word(8)..word(16)),
            UNMAP => Self::Unmapped(word(8)..word(16)),
            FORK => Self::Foreign("a fork"),
            REMAP => Self::Foreign("a mapping that moves"),
            _ => Self::Foreign("a message of an unknown kind"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: u8, words: [u64; 3]) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[0] = event;
        for (at, word) in [8, 16, 24].into_iter().zip(words) {
            bytes[at..at + 8].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn messages_are_understood() {
        assert_eq!(Message::decode(&[0; 32]), None);
        assert_eq!(Message::decode(&message(FAULT, [1, 0x7000, 0])), Some(Message::Fault(0x7000)));
        assert_eq!(Message::decode(&message(REMOVE, [0x1000, 0x3000, 0])), Some(Message::Removed(0x1000..0x3000)));
        assert_eq!(Message::decode(&message(UNMAP, [0x1000, 0x3000, 0])), Some(Message::Unmapped(0x1000..0x3000)));
        assert_eq!(Message::decode(&message(FAULT, [3, 0x7008, 0])), Some(Message::Protected(0x7008)));
        for foreign in
            [message(FAULT, [4, 0, 0]), message(FORK, [3, 0, 0]), message(REMAP, [0; 3]), message(99, [0; 3])]
        {
            assert!(matches!(Message::decode(&foreign), Some(Message::Foreign(_))));
        }
    }
}
