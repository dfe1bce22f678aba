package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"time"
)

// Mode says what the serving end of a connection does.
type Mode uint8

const (
	// Sink receives what the dialling end sends.
	Sink Mode = 1
	// Source sends to the dialling end.
	Source Mode = 2
)

// Header opens a connection: the dialling end writes it first.
type Header struct {
	Mode  Mode
	Seed  uint64 // of the Pattern
	Bytes uint64 // how many bytes follow
}

// Result tells what went over a connection in one direction.
type Result struct {
	Bytes   uint64        `json:"bytes"`
	CRC32C  uint32        `json:"crc32c"`
	Elapsed time.Duration `json:"elapsed_ns"`
}

// String gives size, checksum and rate.
func (r Result) String() string {
	mib := float64(r.Bytes) / (1 << 20)
	return fmt.Sprintf("%.0f MiB in %.2f s, %.1f MiB/s, crc32c %08x", mib, r.Elapsed.Seconds(), mib/r.Elapsed.Seconds(), r.CRC32C)
}

const (
	magic      = 0x76686f7374640001
	headerSize = 25
	// chunk is the size of one read or write: large enough that a guest hands whole TSO frames down.
	chunk = 256 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrContent is returned where a byte arrives that was not sent at that offset.
var ErrContent = errors.New("stream content differs")

// Transfer runs the dialling end: it sends (Sink) or receives (Source) h.Bytes over conn, and compares the checksum
// with the serving end's.
func Transfer(conn net.Conn, h Header) (Result, error) {
	start := time.Now()
	var b [headerSize]byte
	binary.BigEndian.PutUint64(b[0:], magic)
	b[8] = byte(h.Mode)
	binary.BigEndian.PutUint64(b[9:], h.Seed)
	binary.BigEndian.PutUint64(b[17:], h.Bytes)
	if _, err := conn.Write(b[:]); err != nil {
		return Result{}, fmt.Errorf("header: %w", err)
	}
	r, err := half(conn, h, h.Mode == Sink)
	if err != nil {
		return r, err
	}
	theirs, err := exchange(conn, r.CRC32C)
	r.Elapsed = time.Since(start)
	if err != nil {
		return r, fmt.Errorf("checksum of the far end: %w", err)
	}
	if theirs != r.CRC32C {
		return r, fmt.Errorf("%w: crc32c %08x here, %08x there", ErrContent, r.CRC32C, theirs)
	}
	return r, nil
}

// Serve runs the serving end of one connection. The error is nil only if every byte was right.
func Serve(conn net.Conn) (Header, Result, error) {
	start := time.Now()
	var b [headerSize]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return Header{}, Result{}, fmt.Errorf("header: %w", err)
	}
	h := Header{Mode: Mode(b[8]), Seed: binary.BigEndian.Uint64(b[9:]), Bytes: binary.BigEndian.Uint64(b[17:])}
	if m := binary.BigEndian.Uint64(b[0:]); m != magic || (h.Mode != Sink && h.Mode != Source) {
		return h, Result{}, fmt.Errorf("header: magic %#x, mode %d", m, h.Mode)
	}
	r, err := half(conn, h, h.Mode == Source)
	if err != nil {
		return h, r, err
	}
	theirs, err := exchange(conn, r.CRC32C)
	r.Elapsed = time.Since(start)
	if err == nil && theirs != r.CRC32C {
		err = fmt.Errorf("%w: crc32c %08x here, %08x there", ErrContent, r.CRC32C, theirs)
	}
	return h, r, err
}

// half moves the payload in one direction.
func half(conn net.Conn, h Header, sending bool) (Result, error) {
	if sending {
		return send(conn, h)
	}
	return receive(conn, h)
}

func send(conn net.Conn, h Header) (Result, error) {
	p, buf := NewPattern(h.Seed), make([]byte, chunk)
	var r Result
	for r.Bytes < h.Bytes {
		b := buf[:min(chunk, h.Bytes-r.Bytes)]
		p.Fill(b, r.Bytes)
		r.CRC32C = crc32.Update(r.CRC32C, castagnoli, b)
		n, err := conn.Write(b)
		r.Bytes += uint64(n)
		if err != nil {
			return r, fmt.Errorf("send at byte %d of %d: %w", r.Bytes, h.Bytes, err)
		}
	}
	return r, nil
}

func receive(conn net.Conn, h Header) (Result, error) {
	p, buf, scratch := NewPattern(h.Seed), make([]byte, chunk), make([]byte, chunk)
	var r Result
	for r.Bytes < h.Bytes {
		n, err := conn.Read(buf[:min(chunk, h.Bytes-r.Bytes)])
		if at, ok := p.Check(buf[:n], r.Bytes, scratch); !ok {
			return r, fmt.Errorf("%w at byte %d of %d", ErrContent, at, h.Bytes)
		}
		r.CRC32C = crc32.Update(r.CRC32C, castagnoli, buf[:n])
		r.Bytes += uint64(n)
		if err != nil && r.Bytes < h.Bytes {
			return r, fmt.Errorf("receive at byte %d of %d: %w", r.Bytes, h.Bytes, err)
		}
	}
	return r, nil
}

// exchange sends our checksum and returns the far end's. It also proves to the sender that all of it has arrived.
func exchange(conn net.Conn, ours uint32) (uint32, error) {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], ours)
	if _, err := conn.Write(b[:]); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(conn, b[:])
	return binary.BigEndian.Uint32(b[:]), err
}
