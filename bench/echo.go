package bench

import (
	"fmt"
	"time"
)

// lostAfter is how long nothing may come back before the frames that are under way count as lost.
func (c Config) lostAfter() time.Duration {
	if c.LostAfter > 0 {
		return c.LostAfter
	}
	return time.Second
}

// under is how many frames are under way.
func (e *engine) under() int { return int(e.number - e.back - e.given) }

// giveUp counts the frames that are under way as lost. One that comes all the same, later, is taken off that count.
func (e *engine) giveUp() {
	e.given += uint64(e.under())
	e.gone = e.number
}

// returned takes a frame that came back.
func (e *engine) returned() error {
	head := e.first[:]
	if e.got < offBody || !tagged(head, e.tag) || numberOf(head) >= e.number {
		e.foreign++
		return nil
	}
	number := numberOf(head)
	if e.c.Verify {
		if err := checkFrame(e.scratch); err != nil {
			return err
		}
		if number < e.next {
			return fmt.Errorf("frame %d came back after frame %d: twice, or out of order", number, e.next-1)
		}
		e.next = number + 1
	}
	e.htg.Frames++
	e.htg.Bytes += uint64(e.got)
	if number < e.gone {
		if e.given > 0 {
			e.given--
		}
		e.back++
		return nil
	}
	e.back++
	e.hist.Add(e.now - stampOf(head))
	if e.c.Think > 0 {
		e.thought = e.now + e.c.Think
	}
	return nil
}

// settle waits until nothing is under way, or nothing has moved for as long as a frame may take.
func (e *engine) settle() error {
	hist := e.hist
	e.hist = &e.scrap
	defer func() { e.hist = hist }()
	if !e.c.Direction.sends() {
		return nil
	}
	e.look()
	for e.progress(); e.s.send.driver.Out() > 0 || e.c.Returns() && e.under() > 0; e.look() {
		worked := e.collect()
		if err := e.s.send.err(); err != nil {
			return err
		}
		if e.c.Direction.receives() {
			n, err := e.receive()
			if err != nil {
				return err
			}
			worked = worked || n > 0 && e.c.Returns()
		}
		if worked {
			e.progress()
		} else if err := e.stuck(); err != nil {
			return err
		}
	}
	return nil
}
