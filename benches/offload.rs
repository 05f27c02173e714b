//! What the software engine for offloads costs: the checksum, against 16 bits at a time; and 64 KiB of TCP payload as one
//! frame that is copied, as segments whose checksums the receiver completes, as complete segments, and as segments of either
//! kind that are merged into one frame.
//!
//! `cargo bench --bench offload`. Figures are bytes per second.

#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use linecard::frame::{self, Batch, Needs};
use linecard::limits::VNET_HEADER_BYTES;
use linecard::mem::{Cursor, Span};
use linecard::offload::{Group, Merger, Rewrite, admit};
use linecard::wire::checksum::Sum;
use linecard::wire::virtio_net::{GSO_TCPV4, NEEDS_CSUM, VnetHeader};

fn naive(bytes: &[u8]) -> u16 {
    let sum: u64 = bytes.chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    (sum % 0xffff) as u16
}

fn checksum(criterion: &mut Criterion) {
    let bytes: Vec<u8> = (0..1448u32).map(|i| (i % 251) as u8).collect();
    let mut group = criterion.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("wide", |bencher| {
        bencher.iter(|| {
            let mut sum = Sum::new();
            sum.add(black_box(&bytes));
            sum.folded()
        });
    });
    group.bench_function("16 bits at a time", |bencher| bencher.iter(|| naive(black_box(&bytes))));
}

/// An IPv4 TCP frame of 62 KiB and its virtio-net header.
fn large() -> (Vec<u8>, VnetHeader) {
    let mut bytes = vec![0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1, 8, 0];
    bytes.extend([0x45, 0, 0xf8, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x80, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.resize(66 + 43 * 1448, 1);
    let header = VnetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        ..VnetHeader::PLAIN
    };
    (bytes, header)
}

fn segments(criterion: &mut Criterion) {
    let (bytes, header) = large();
    let mut group = criterion.benchmark_group("62 KiB of TCP");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    let mut memory = bytes.clone();
    let mut room = vec![0; 80 << 10];
    let mut heads = frame::heads();
    let mut batch = Batch::new(&mut heads, 0);
    admit(&mut batch, bytes.len(), &[Span::from_buffer(&mut memory)], &header.to_bytes(), Needs::ALL);
    group.bench_function("as one frame", |bencher| {
        bencher.iter(|| {
            let room = [Span::from_buffer(&mut room)];
            batch.source(0).copy(bytes.len(), &mut Cursor::new(black_box(&room)));
        });
    });
    for (name, accepts) in [("partial segments", Needs::CSUM), ("complete segments", Needs::NONE)] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let Ok(mut rewrite) = Rewrite::of(&batch, 0, accepts) else { return };
                let mut rest = Span::from_buffer(&mut room);
                while let Some(len) = rewrite.next_len() {
                    rewrite.write(VNET_HEADER_BYTES, 1, Cursor::new(black_box(&[rest])));
                    rest = rest.split_at(VNET_HEADER_BYTES + len).1;
                }
            });
        });
    }
}

/// The same payload as 43 frames in one batch, delivered one by one and merged.
fn merge(criterion: &mut Criterion) {
    let (bytes, header) = large();
    let mut group = criterion.benchmark_group("62 KiB of TCP in segments");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    let mut room = vec![0; 80 << 10];
    for (name, accepts) in [("partial", Needs::CSUM), ("complete", Needs::NONE)] {
        let (mut whole, mut heads) = (bytes.clone(), frame::heads());
        let mut large = Batch::new(&mut heads, 0);
        admit(&mut large, bytes.len(), &[Span::from_buffer(&mut whole)], &header.to_bytes(), Needs::ALL);
        let mut frames = cut(&large, accepts);
        let mut heads = frame::heads();
        let mut batch = Batch::new(&mut heads, 0);
        for (header, frame) in &mut frames {
            let len = frame.len();
            admit(&mut batch, len, &[Span::from_buffer(frame)], header, Needs::ALL);
        }
        group.bench_function(format!("{name}, one by one"), |bencher| {
            bencher.iter(|| {
                for index in 0..batch.len() {
                    let room = [Span::from_buffer(&mut room)];
                    batch.source(index).copy(1514, &mut Cursor::new(black_box(&room)));
                }
            });
        });
        group.bench_function(format!("{name}, merged"), |bencher| {
            bencher.iter(|| {
                let mut merger = Merger::new(Needs::ALL);
                let mut each = |group| -> Result<(), ()> {
                    let Group::Merge(merge) = group else { return Err(()) };
                    let room = [Span::from_buffer(&mut room)];
                    merge.write(&batch, VNET_HEADER_BYTES, 1, Cursor::new(black_box(&room))).then_some(()).ok_or(())
                };
                let taken = (0..batch.len() as u8).try_for_each(|index| merger.take(&batch, index, true, &mut each));
                taken.and_then(|()| merger.finish(&mut each))
            });
        });
    }
}

/// The segments of the one frame of `batch` for a receiver that can do `accepts`, each behind its virtio-net header.
fn cut(batch: &Batch<'_>, accepts: Needs) -> Vec<([u8; VNET_HEADER_BYTES], Vec<u8>)> {
    let mut frames = Vec::new();
    let Ok(mut rewrite) = Rewrite::of(batch, 0, accepts) else { return frames };
    while let Some(len) = rewrite.next_len() {
        let mut memory = vec![0; VNET_HEADER_BYTES + len];
        rewrite.write(VNET_HEADER_BYTES, 1, Cursor::new(&[Span::from_buffer(&mut memory)]));
        if let Some((header, frame)) = memory.split_first_chunk() {
            frames.push((*header, frame.to_vec()));
        }
    }
    frames
}

criterion_group!(benches, checksum, segments, merge);
criterion_main!(benches);
