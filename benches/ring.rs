//! What a ring costs per frame: gather a batch of 32, complete it, publish it; split and packed, and virtio-queue doing the
//! same with a split ring beside them. Divide a time by 32 for one frame. Frames have 64 bytes, in one descriptor, in two, or in an indirect table of two.
//!
//! All devices find their rings filled: a driver's part is one store of the available index per batch, and in a packed ring
//! the flags of the batch's descriptors, which the driver of the bench has to write anew. All end with
//! bounds-checked places of the buffers in host memory and with the answer whether to interrupt.
//!
//! `cargo bench --bench ring`

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use linecard::mem::{GuestMemory, Region};
use linecard::ring::{Chains, DeviceRing, PackedRing, Readable, RingConfig, SplitRing};
use virtio_queue::{Queue, QueueT};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: u16 = 256;
const BATCH: u16 = 32;

/// The ring's areas, then tables and buffers.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
const INDIRECT_TABLES: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;
const MEMORY_BYTES: usize = 0x20_0000;

/// How the descriptors of a frame lie.
#[derive(Debug, Clone, Copy)]
enum Shape {
    Single,
    Chained,
    Indirect,
}

/// Hands every byte that the driver wrote to `write`: 128 frames, and an available ring that names them in order.
fn fill(shape: Shape, mut write: impl FnMut(u64, &[u8])) {
    const NEXT: u64 = 1;
    const INDIRECT: u64 = 4;
    let descriptor = |address: u64, len: u64, flags: u64, next: u64| {
        [address.to_le_bytes(), (len | flags << 32 | next << 48).to_le_bytes()].concat()
    };
    for frame in 0..u64::from(SIZE / 2) {
        let (place, buffer) = (TABLE + 32 * frame, BUFFERS + 2048 * frame);
        // A page that nobody touched is not mapped yet, and a prefetch there is a futile page walk each time.
        write(buffer, &[0xaa; 76]);
        match shape {
            Shape::Single => write(place, &descriptor(buffer, 76, 0, 0)),
            Shape::Chained => {
                write(place, &descriptor(buffer, 12, NEXT, 2 * frame + 1));
                write(place + 16, &descriptor(buffer + 64, 64, 0, 0));
            }
            Shape::Indirect => {
                let table = INDIRECT_TABLES + 512 * frame;
                write(place, &descriptor(table, 32, INDIRECT, 0));
                write(table, &descriptor(buffer, 12, NEXT, 1));
                write(table + 16, &descriptor(buffer + 64, 64, 0, 0));
            }
        }
        let head = (2 * frame as u16).to_le_bytes();
        write(AVAILABLE + 4 + 2 * frame, &head);
        write(AVAILABLE + 4 + 2 * (frame + u64::from(SIZE / 2)), &head);
    }
}

fn ours(group: &mut BenchmarkGroup<'_, WallTime>, shape: Shape) {
    let memory = Arc::new(GuestMemory::new(vec![Arc::new(Region::new(0, 0, MmapRegion::new(MEMORY_BYTES).unwrap()))]));
    let write = |address, bytes: &[u8]| _ = memory.span(address, bytes.len() as u32, &mut 0).unwrap().write(bytes);
    fill(shape, write);
    let config = RingConfig {
        packed: false,
        size: SIZE,
        descriptors: TABLE,
        available: AVAILABLE,
        used: USED,
        base: 0,
        event_idx: true,
        indirect: true,
        in_order: false,
    };
    let mut ring = SplitRing::start(config, Arc::clone(&memory)).unwrap();
    let (mut available, index) = (0u16, memory.span(AVAILABLE + 2, 2, &mut 0).unwrap());
    group.bench_function(format!("{shape:?}/linecard"), |bencher| {
        bencher.iter(|| {
            available = available.wrapping_add(BATCH);
            index.write_exact(&available.to_le_bytes());
            let mut chains = Chains::new();
            assert_eq!(ring.gather::<Readable>(&memory, usize::from(BATCH), &mut chains), Ok(usize::from(BATCH)));
            for chain in chains.list() {
                black_box(chains.pieces(chain));
                ring.complete(chain, 0);
            }
            black_box(ring.publish())
        });
    });
}

/// The same frames in a packed ring. What the driver writes for a batch is what it must write for any: the second word of
/// each of its descriptors.
fn packed(group: &mut BenchmarkGroup<'_, WallTime>, shape: Shape, in_order: bool) {
    let memory = Arc::new(GuestMemory::new(vec![Arc::new(Region::new(0, 0, MmapRegion::new(MEMORY_BYTES).unwrap()))]));
    let write = |address, bytes: &[u8]| _ = memory.span(address, bytes.len() as u32, &mut 0).unwrap().write(bytes);
    let slots: u16 = if matches!(shape, Shape::Chained) { 2 } else { 1 };
    let mut tails = Vec::new();
    for slot in 0..SIZE {
        let (frame, second) = (u64::from(slot / slots), slot % slots);
        let (buffer, table) = (BUFFERS + 2048 * (frame % 512), INDIRECT_TABLES + 64 * frame);
        let (address, len, flags) = match (shape, second) {
            (Shape::Single, _) => (buffer, 76, 0),
            (Shape::Chained, 0) => (buffer, 12, 1u64),
            (Shape::Chained, _) => (buffer + 64, 64, 0),
            (Shape::Indirect, _) => (table, 32, 4),
        };
        write(buffer, &[0xaa; 76]);
        for (at, (address, len)) in [(buffer, 12u64), (buffer + 64, 64)].into_iter().enumerate() {
            write(table + 16 * at as u64, &[address.to_le_bytes(), len.to_le_bytes()].concat());
        }
        write(TABLE + 16 * u64::from(slot), &address.to_le_bytes());
        tails.push(len | u64::from(slot) << 32 | flags << 48);
    }
    let config = RingConfig {
        packed: true,
        size: SIZE,
        descriptors: TABLE,
        available: AVAILABLE,
        used: USED,
        base: 0x8000,
        event_idx: true,
        indirect: true,
        in_order,
    };
    let mut ring = PackedRing::start(config, Arc::clone(&memory)).unwrap();
    let places: Vec<_> =
        (0..SIZE).map(|slot| memory.span(TABLE + 16 * u64::from(slot) + 8, 8, &mut 0).unwrap()).collect();
    let (mut next, mut wrap) = (0, 1 << 55);
    let name = if in_order { "packed, in order" } else { "packed" };
    group.bench_function(format!("{shape:?}/{name}"), |bencher| {
        bencher.iter(|| {
            for _ in 0..BATCH * slots {
                places[next].write_exact(&(tails[next] | wrap).to_le_bytes());
                next += 1;
                if next == usize::from(SIZE) {
                    (next, wrap) = (0, wrap ^ (1 << 55 | 1 << 63));
                }
            }
            let mut chains = Chains::new();
            assert_eq!(ring.gather::<Readable>(&memory, usize::from(BATCH), &mut chains), Ok(usize::from(BATCH)));
            for chain in chains.list() {
                black_box(chains.pieces(chain));
                ring.complete(chain, 0);
            }
            black_box(ring.publish())
        });
    });
}

fn theirs(group: &mut BenchmarkGroup<'_, WallTime>, shape: Shape) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
    fill(shape, |address, bytes| memory.write_slice(bytes, GuestAddress(address)).unwrap());
    let mut queue = Queue::new(SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_event_idx(true);
    queue.set_ready(true);
    let mut available = 0u16;
    group.bench_function(format!("{shape:?}/virtio-queue"), |bencher| {
        bencher.iter(|| {
            available = available.wrapping_add(BATCH);
            memory.write_obj(available, GuestAddress(AVAILABLE + 2)).unwrap();
            for _ in 0..BATCH {
                let chain = queue.pop_descriptor_chain(&memory).unwrap();
                let head = chain.head_index();
                for descriptor in chain {
                    black_box(memory.get_slice(descriptor.addr(), descriptor.len() as usize).unwrap());
                }
                queue.add_used(&memory, head, 0).unwrap();
            }
            black_box(queue.needs_notification(&memory).unwrap())
        });
    });
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("ring");
    group.throughput(Throughput::Elements(BATCH.into()));
    for shape in [Shape::Single, Shape::Chained, Shape::Indirect] {
        ours(&mut group, shape);
        packed(&mut group, shape, false);
        packed(&mut group, shape, true);
        theirs(&mut group, shape);
    }
    group.finish();
    criterion.final_summary();
}
