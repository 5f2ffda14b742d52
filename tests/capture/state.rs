//! The state of a VM goes into KVM as it came out.

use std::time::Duration;

use epochfs::capture::Vm;
use epochfs::vmm::kvm::{Counter, Guest, Machine, Part, Spec, Tracking, VmState};

use crate::fixture::{Printed, boot, can_run, shape};

const PARTS_OF_VM: [Part; 6] = [Part::Shape, Part::FirstPic, Part::SecondPic, Part::IoApic, Part::Serial, Part::Timer];

const PARTS_OF_PROCESSOR: [Part; 10] = [
    Part::CpuId,
    Part::TscKhz,
    Part::MpState,
    Part::Registers,
    Part::SpecialRegisters,
    Part::Vectors,
    Part::ControlRegisters,
    Part::DebugRegisters,
    Part::Events,
    Part::LocalApic,
];

/// Time stamps run on while nothing else does.
const TIME_STAMPS: [u32; 2] = [0x10, 0x3b];

fn msrs(state: &VmState, processor: u16) -> Vec<(u32, u64)> {
    let bytes = state.get(Some(processor), Part::ModelRegisters).unwrap();
    let entry = |bytes: &[u8]| {
        let index = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        (index, u64::from_le_bytes(bytes[8..16].try_into().unwrap()))
    };
    bytes.chunks(16).map(entry).collect()
}

fn number_of(part: Part, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if part == Part::Timer {
        // When each of the three channels was loaded, by this host's clock.
        for channel in 0..3 {
            bytes[channel * 24 + 16..channel * 24 + 24].fill(0);
        }
    }
    if part == Part::LocalApic {
        // What is left on its timer.
        bytes[0x390..0x394].fill(0);
    }
    bytes
}

#[test]
fn what_is_saved_is_restored_whole() {
    if !can_run("what_is_saved_is_restored_whole") {
        return;
    }
    let guest = Guest::Counter(Counter { has_timer: true, sweep_bits: Some(12), ..Counter::default() });
    let spec = Spec { shape: shape(8, 4), processors: 2, tracking: Tracking::Log };
    let (mut made, _, _) = boot(&spec, &guest);
    for _ in 0..5 {
        made.machine.resume().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        made.machine.pause().unwrap();
        let before = VmState::decode(&made.machine.state().unwrap()).unwrap();
        let mut again = Machine::restore(&before, Tracking::Log, Printed::default().output()).unwrap();
        again.machine.pause().unwrap();
        let after = VmState::decode(&again.machine.state().unwrap()).unwrap();
        for part in PARTS_OF_VM {
            let [before, after] = [&before, &after].map(|state| number_of(part, state.get(None, part).unwrap()));
            assert_eq!(before, after, "{part:?}");
        }
        for processor in 0..2 {
            for part in PARTS_OF_PROCESSOR {
                let get = |state: &VmState| number_of(part, state.get(Some(processor), part).unwrap());
                assert_eq!(get(&before), get(&after), "{part:?} of processor {processor}");
            }
            let (before, after) = (msrs(&before, processor), msrs(&after, processor));
            assert!(before.len() > 10 && before.len() == after.len(), "{} and {}", before.len(), after.len());
            for ((index, before), (_, after)) in before.into_iter().zip(after) {
                match TIME_STAMPS.contains(&index) {
                    // It goes on from where it was.
                    true => assert!(after >= before && after - before < 60_000_000_000, "{index:#x}: {before} {after}"),
                    false => assert_eq!(before, after, "model-specific register {index:#x}"),
                }
            }
        }
        let clock =
            |state: &VmState| u64::from_le_bytes(state.get(None, Part::Clock).unwrap()[..8].try_into().unwrap());
        assert!((clock(&before)..clock(&before) + 60_000_000_000).contains(&clock(&after)), "the clock goes on");
    }
}

/// A state whose sections say what cannot be is refused with a word, and never restored in part.
#[test]
fn a_state_that_cannot_be_is_refused() {
    if !can_run("a_state_that_cannot_be_is_refused") {
        return;
    }
    let spec = Spec { shape: shape(4, 1024), processors: 1, tracking: Tracking::Log };
    let (mut made, _, _) = boot(&spec, &Guest::Counter(Counter::default()));
    let state = VmState::decode(&made.machine.state().unwrap()).unwrap();
    let restore = |state: &VmState| Machine::restore(state, Tracking::Log, Printed::default().output()).map(drop);
    restore(&state).unwrap();
    for part in [Part::Shape, Part::FirstPic, Part::Timer, Part::Clock, Part::Serial] {
        let mut cut = state.clone();
        cut.put(None, part, vec![1; 3]);
        assert!(restore(&cut).is_err(), "{part:?}");
    }
    for part in PARTS_OF_PROCESSOR.into_iter().chain([Part::ModelRegisters]) {
        let mut cut = state.clone();
        cut.put(Some(0), part, vec![1; 3]);
        assert!(restore(&cut).is_err(), "{part:?}");
    }
    let mut shape = state.get(None, Part::Shape).unwrap().to_vec();
    shape[16..20].copy_from_slice(&9_u32.to_le_bytes());
    let mut more = state.clone();
    more.put(None, Part::Shape, shape);
    assert!(restore(&more).is_err(), "processors without a state");
}
