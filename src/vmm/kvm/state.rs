//! The state of processors and of what KVM emulates round them: out of KVM, and back in.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{VcpuFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::kvm_error;
use super::machine::{get_vectors, set_vectors};
use super::vmstate::{Part, VmState};
use crate::error::{Error, Result};

/// Set after the time stamp that it is compared with.
const TSC_DEADLINE: u32 = 0x6e0;

/// At most so many in a call.
const MSRS_TOGETHER: usize = 128;

/// Puts a structure into the state.
fn put<T: IntoBytes + Immutable>(state: &mut VmState, processor: Option<u16>, part: Part, value: &T) {
    state.put(processor, part, value.as_bytes().to_vec());
}

/// Takes a structure out of the state; it has exactly its size.
fn take<T: FromBytes>(state: &VmState, processor: Option<u16>, part: Part) -> Result<T> {
    let bytes = state.get(processor, part)?;
    T::read_from_bytes(bytes).map_err(|_| wrong_len(part, bytes.len()))
}

/// Takes structures that follow each other.
fn take_all<T: FromBytes>(state: &VmState, processor: Option<u16>, part: Part) -> Result<Vec<T>> {
    let bytes = state.get(processor, part)?;
    let chunks = bytes.chunks_exact(size_of::<T>());
    if !chunks.remainder().is_empty() {
        return Err(wrong_len(part, bytes.len()));
    }
    chunks.map(|chunk| T::read_from_bytes(chunk).map_err(|_| wrong_len(part, bytes.len()))).collect()
}

fn wrong_len(part: Part, len: usize) -> Error {
    Error::damaged(format!("the state of the VM is damaged: {part:?} has {len} bytes"))
}

/// What is read of each processor: found out once.
#[derive(Clone, Debug, Default)]
pub struct Readable {
    pub msrs: Vec<u32>,
}

impl Readable {
    /// The model-specific registers that KVM knows and lets be read here.
    pub fn find(processor: &VcpuFd, known: &[u32]) -> Result<Self> {
        let mut msrs = Vec::new();
        for index in known.iter().filter(|index| **index != TSC_DEADLINE) {
            if read_msrs(processor, &[*index])?.len() == 1 {
                msrs.push(*index);
            }
        }
        if read_msrs(processor, &[TSC_DEADLINE])?.len() == 1 {
            msrs.push(TSC_DEADLINE);
        }
        Ok(Self { msrs })
    }
}

fn entries(indices: &[u32]) -> Result<Msrs> {
    let entries: Vec<_> = indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| Error::usage("too many registers at a time"))
}

/// As many as can be read, from the first on.
fn read_msrs(processor: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut msrs = entries(indices)?;
    let count = processor.get_msrs(&mut msrs).map_err(kvm_error("cannot read model-specific registers"))?;
    Ok(msrs.as_slice()[..count].to_vec())
}

/// Everything of a processor that does not run.
pub fn save_processor(processor: &VcpuFd, vm: &VmFd, number: u16, readable: &Readable) -> Result<VmState> {
    let mut state = VmState::default();
    let this = Some(number);
    // This may change other parts, so it comes first.
    put(&mut state, this, Part::MpState, &processor.get_mp_state().map_err(kvm_error("cannot read the run state"))?);
    put(&mut state, this, Part::Registers, &processor.get_regs().map_err(kvm_error("cannot read registers"))?);
    put(&mut state, this, Part::SpecialRegisters, &processor.get_sregs().map_err(kvm_error("cannot read segments"))?);
    state.put(this, Part::Vectors, get_vectors(processor, vm)?);
    put(&mut state, this, Part::ControlRegisters, &processor.get_xcrs().map_err(kvm_error("cannot read XCRs"))?);
    let debug = processor.get_debug_regs().map_err(kvm_error("cannot read debug registers"))?;
    put(&mut state, this, Part::DebugRegisters, &debug);
    put(&mut state, this, Part::LocalApic, &processor.get_lapic().map_err(kvm_error("cannot read the local APIC"))?);
    if let Ok(khz) = processor.get_tsc_khz() {
        put(&mut state, this, Part::TscKhz, &khz);
    }
    let mut msrs = Vec::with_capacity(readable.msrs.len() * size_of::<kvm_msr_entry>());
    for indices in readable.msrs.chunks(MSRS_TOGETHER) {
        let read = read_msrs(processor, indices)?;
        if let Some(index) = indices.get(read.len()) {
            return Err(Error::io(
                format!("the model-specific register {index:#x} cannot be read any more"),
                std::io::Error::from_raw_os_error(rustix::io::Errno::INVAL.raw_os_error()),
            ));
        }
        msrs.extend(read.iter().flat_map(|entry| entry.as_bytes().to_vec()));
    }
    state.put(this, Part::ModelRegisters, msrs);
    let cpuid = processor.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(kvm_error("cannot read CPUID"))?;
    state.put(this, Part::CpuId, cpuid.as_slice().iter().flat_map(|entry| entry.as_bytes().to_vec()).collect());
    let events = processor.get_vcpu_events().map_err(kvm_error("cannot read events"))?;
    put(&mut state, this, Part::Events, &events);
    Ok(state)
}

/// Makes a processor that never ran what it was.
pub fn restore_processor(processor: &VcpuFd, vm: &VmFd, number: u16, state: &VmState) -> Result<()> {
    let this = Some(number);
    let cpuid: Vec<kvm_cpuid_entry2> = take_all(state, this, Part::CpuId)?;
    let cpuid = CpuId::from_entries(&cpuid).map_err(|_| Error::damaged("the state of the VM has too much CPUID"))?;
    processor.set_cpuid2(&cpuid).map_err(|error| {
        kvm_error("this host's processor cannot be what the VM ran on")(error)
            .hint("restore it on a host with the same processor features")
    })?;
    if state.find(this, Part::TscKhz).is_some() {
        let khz: u32 = take(state, this, Part::TscKhz)?;
        if processor.get_tsc_khz().ok() != Some(khz) {
            processor.set_tsc_khz(khz).map_err(|error| {
                kvm_error("this host's time stamp cannot run as fast as the VM's did")(error)
                    .hint("restore it on a host whose processor scales time stamps, or runs at the same rate")
            })?;
        }
    }
    let mp_state: kvm_mp_state = take(state, this, Part::MpState)?;
    processor.set_mp_state(mp_state).map_err(kvm_error("cannot set the run state"))?;
    let registers: kvm_regs = take(state, this, Part::Registers)?;
    processor.set_regs(&registers).map_err(kvm_error("cannot set registers"))?;
    let special: kvm_sregs = take(state, this, Part::SpecialRegisters)?;
    processor.set_sregs(&special).map_err(kvm_error("cannot set segments"))?;
    let control: kvm_xcrs = take(state, this, Part::ControlRegisters)?;
    processor.set_xcrs(&control).map_err(kvm_error("cannot set XCRs"))?;
    set_vectors(processor, vm, state.get(this, Part::Vectors)?)?;
    let debug: kvm_debugregs = take(state, this, Part::DebugRegisters)?;
    processor.set_debug_regs(&debug).map_err(kvm_error("cannot set debug registers"))?;
    let apic: kvm_lapic_state = take(state, this, Part::LocalApic)?;
    processor.set_lapic(&apic).map_err(kvm_error("cannot set the local APIC"))?;
    // After the local APIC, whose timer one of them sets.
    for entry in take_all::<kvm_msr_entry>(state, this, Part::ModelRegisters)? {
        set_msr(processor, entry)?;
    }
    let events: kvm_vcpu_events = take(state, this, Part::Events)?;
    processor.set_vcpu_events(&events).map_err(kvm_error("cannot set events"))?;
    Ok(())
}

fn set_msr(processor: &VcpuFd, entry: kvm_msr_entry) -> Result<()> {
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| Error::usage("too many registers at a time"))?;
    if processor.set_msrs(&msrs).is_ok_and(|count| count == 1) {
        return Ok(());
    }
    // Some can be read and not written, and have the right value by themselves.
    match read_msrs(processor, &[entry.index])?.first() {
        Some(now) if now.data == entry.data => Ok(()),
        _ => Err(Error::usage(format!(
            "this host does not take {:#x} as model-specific register {:#x}",
            entry.data, entry.index
        ))
        .hint("restore the VM on a host with the same processor features")),
    }
}

const CHIPS: [(Part, u32); 3] = [
    (Part::FirstPic, KVM_IRQCHIP_PIC_MASTER),
    (Part::SecondPic, KVM_IRQCHIP_PIC_SLAVE),
    (Part::IoApic, KVM_IRQCHIP_IOAPIC),
];

/// What KVM emulates of the VM beside its processors, which do not run.
pub fn save_chips(vm: &VmFd, state: &mut VmState) -> Result<()> {
    for (part, chip_id) in CHIPS {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(kvm_error("cannot read an interrupt controller"))?;
        put(state, None, part, &chip);
    }
    put(state, None, Part::Timer, &vm.get_pit2().map_err(kvm_error("cannot read the timer"))?);
    put(state, None, Part::Clock, &vm.get_clock().map_err(kvm_error("cannot read the clock"))?);
    Ok(())
}

pub fn restore_chips(vm: &VmFd, state: &VmState) -> Result<()> {
    for (part, chip_id) in CHIPS {
        let chip: kvm_irqchip = take(state, None, part)?;
        if chip.chip_id != chip_id {
            return Err(Error::damaged(format!("the state of the VM has controller {} as {part:?}", chip.chip_id)));
        }
        vm.set_irqchip(&chip).map_err(kvm_error("cannot set an interrupt controller"))?;
    }
    let timer: kvm_pit_state2 = take(state, None, Part::Timer)?;
    vm.set_pit2(&timer).map_err(kvm_error("cannot set the timer"))?;
    let clock: kvm_clock_data = take(state, None, Part::Clock)?;
    // It goes on from where it was, and not from what time it is now.
    let clock = kvm_clock_data { clock: clock.clock, ..Default::default() };
    vm.set_clock(&clock).map_err(kvm_error("cannot set the clock"))?;
    Ok(())
}
